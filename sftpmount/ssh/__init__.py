"""A hardened byte channel to the server: policy, transport, host keys, connecting."""
