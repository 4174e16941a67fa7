"""What happens when the connection, the server or its disk fails while programs use the mount."""
