"""What goes over the wire, shared by server and client."""
