"""sftpmount: a hardened SFTP server as a local folder that backup tools can rely on."""

__version__ = "0.1.0"
