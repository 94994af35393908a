"""The daemon: REST and WebSocket on top of the engine."""
