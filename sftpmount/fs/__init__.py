"""The semantics of a local folder over a remote, and the FUSE adapter for them."""
