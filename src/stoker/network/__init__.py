"""Address plans and firewall rules."""
