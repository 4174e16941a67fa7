"""sftpmount beside other mounts of the same server: `speed` measures how fast, `faults` what they do when something fails,
`doors` which servers they connect to and which they refuse."""
