"""The file protocol: SFTP v3 with the OpenSSH extensions, pipelined over several channels."""
