"""The SDK: speaks HTTP with the daemon, never imports the engine."""
