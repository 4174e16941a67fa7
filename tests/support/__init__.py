"""Real servers, a bad network and real mounts for the tests. See sshd.py, relay.py and mount.py."""
