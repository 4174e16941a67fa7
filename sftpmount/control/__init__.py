"""A mount, seen and steered from outside: ``sftpmount status``, ``sync`` and ``umount``, SIGUSR1, and metrics.

The mount's process listens on a Unix socket of its own in a directory that only its user may enter (``directory``), and
answers nobody else (SO_PEERCRED). One connection is one request: a line of JSON, ``{"request": NAME}``, answered by lines
of JSON, each an object with one key:

status   ``state``: what status.schema.json describes
sync     ``progress``, several times a second, then ``end``
unmount  ``progress``, then ``end`` where the mount stays; else ``unmounted``, and ``progress`` and ``end`` as its process ends

``end`` holds ``unstored``, ["path: reason"], and ``why`` the mount stays, "" where it does not. ``error`` comes in place of all
that where the request is not understood or not allowed. Who closes the connection takes the request back: nothing more
is done for it, and what is being stored goes on as if nobody had asked.

What these requests do is the file system's (``sync``) and ``mountpoint``'s; here they are only asked for, and looked at.
"""
