"""A process that works in a pool and dies at a named point: ``storage_worker.py POOL STRATEGY BASE SIZE POINT VERB WORD...``.

Says ``ready`` when the pool is open. With the verb ``hold`` it keeps the pool until its standard input ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from stoker.host.trace import arm
from stoker.storage.pool import Pool
from stoker.storage.strategy import Base, Strategy


def main(directory: str, strategy: str, base: str, size: str, point: str, verb: str, *words: str) -> None:
    pool = Pool.open(Path(directory), Strategy(strategy), who="stoker serve")
    arm(point)
    if verb == "hold":
        print("ready", flush=True)
        sys.stdin.read()
    elif verb == "clone":
        pool.clone(Base(Path(base), int(size)), words[0], int(words[1]))
    elif verb == "clone_of":
        pool.clone_of(*words)
    elif verb == "grow":
        pool.grow(words[0], int(words[1]))
    elif verb == "flatten":
        pool.flatten(words[0], Path(words[1]))
    elif verb == "remove":
        pool.remove(words[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
