"""The host's side of the agent protocol (docs/agent-protocol.md)."""
