"""What we know of the server (namespace) and hold for it (blocks), and the plans for reading and writing.

Lock order, for the whole package; take from left to right, never the other way:

    Node.operation  <  Namespace._lock  <  FileCache.lock  <  CleanBlocks._lock, WriteBack._lock  <  sftp (Remote, Session)

``Node.operation`` serialises operations on one file that must not interleave (open with truncation, truncate, flush,
attribute changes) and is the only lock that may be held across a wait for the network; who needs several (rename) takes
them in the order of their ids. All others are held for some microseconds: decide under the lock, act outside, check again
after. Callbacks of replies run in the thread that reads, which may be one that waits with Node.operation held, and take
FileCache.lock and what stands right of it, nothing else.
"""
