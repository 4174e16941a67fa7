"""The mount as a part of the system: mount(8), fstab, systemd, and what contrib/install puts there."""
