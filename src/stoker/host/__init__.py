"""One module per kernel or system facility; no policy, no state, no knowledge of sandboxes."""
