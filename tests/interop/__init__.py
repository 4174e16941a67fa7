"""Which SFTP servers people have, what each lacks, and what the mount does then. See servers.py and findings.py."""
