"""sftpmount beside other mounts of the same server: `throughput` is the command, `workloads` what it can measure."""
