"""Every option of sshfs 3.7 and what becomes of it here; tests hold it to the table of options and to ``sshfs --help``."""

from __future__ import annotations

from typing import NamedTuple, Tuple


class Row(NamedTuple):
    """``shown`` as sshfs's own --help has it; ``verdict`` is one of same, accepted, replaced, refused."""

    shown: str
    verdict: str
    note: str


FLAGS: Tuple[Row, ...] = (
    Row("-h, --help", "same", ""),
    Row("-V, --version", "same", ""),
    Row("-f", "same", "stay in the foreground"),
    Row("-d, --debug", "same", "and log what happens, in the foreground"),
    Row("-v, --verbose", "same", "log more"),
    Row("-p PORT", "same", ""),
    Row("-F FILE", "same", "`none` for no file"),
    Row("-o NAME[=VALUE],...", "same", r"a comma within a value is written `\,`"),
    Row("-C", "accepted", "data travels uncompressed: backups are compressed already"),
    Row("-s", "accepted", "the mount has several threads all the same"),
    Row("-1", "refused", "SSH 1 is broken"),
)

WORDS: Tuple[Row, ...] = (
    Row("reconnect", "accepted", "always on, and files that are open go on as well"),
    Row("delay_connect", "accepted", "connects at once and tells of mistakes; `x-systemd.automount` in fstab delays the mount"),
    Row("sshfs_sync", "refused", "`close()` waits until the server has it all, which is what counts"),
    Row("no_readahead", "same", "`read_ahead=0`"),
    Row("sync_readdir", "accepted", "always so"),
    Row("dir_cache=BOOL", "same", "`no` is `dcache_timeout=0`"),
    Row("dcache_max_size=N", "same", "200000 by default"),
    Row("dcache_timeout=N", "same", ""),
    Row("dcache_{stat,link,dir}_timeout=N", "same", "one time holds for all: the shortest"),
    Row("dcache_clean_interval=N", "accepted", "nothing is cleaned by the clock"),
    Row("dcache_min_clean_interval=N", "accepted", "nothing is cleaned by the clock"),
    Row("direct_io", "accepted", "the kernel's cache is kept right instead, and mmap works"),
    Row("workaround=LIST", "accepted", "what the server can do is found out"),
    Row("idmap=TYPE", "same", "`none` and `user`; not `file`"),
    Row("uidfile=FILE", "replaced", "`idmap=user`, or `uid=N`: names are not translated"),
    Row("gidfile=FILE", "replaced", "`idmap=user`, or `gid=N`"),
    Row("nomap=TYPE", "refused", "belongs to `idmap=file`"),
    Row("ssh_command=CMD", "replaced", "its options as options here, or `ssh_config=FILE`: no ssh program is run"),
    Row("ssh_protocol=N", "refused", "but for 2"),
    Row("sftp_server=SERV", "refused", "but for `sftp`; another program is named in the server's sshd_config"),
    Row("directport=PORT", "refused", "the connection would not be encrypted"),
    Row("passive", "refused", "the connection would not be encrypted"),
    Row("disable_hardlink", "accepted", "what the server can do is found out"),
    Row("transform_symlinks", "same", "those that lead into the mount"),
    Row("contain_symlinks", "same", "but not the default: a backup has absolute links in it, and they are to read as they are"),
    Row("no_contain_symlinks", "same", "as is the default"),
    Row("follow_symlinks", "refused", "a link to a parent would be a tree without end, and `rm -r` would follow"),
    Row("no_check_root", "accepted", "the directory is looked at all the same"),
    Row("password_stdin", "same", ""),
    Row("max_conns=N", "accepted", "one connection with several `lanes` does the same"),
    Row("SSHOPT=VAL", "same", "as ssh_config(5), in any case; `StrictHostKeyChecking=no` is refused"),
    # libfuse's, as sshfs lists them
    Row("kernel_cache", "accepted", "the mount keeps the kernel's caches right by itself"),
    Row("[no]auto_cache", "accepted", "likewise"),
    Row("no_rofd_flush", "accepted", "likewise"),
    Row("umask=M", "same", ""),
    Row("uid=N", "same", ""),
    Row("gid=N", "same", ""),
    Row("entry_timeout=T", "accepted", "`dcache_timeout` says how long names are believed"),
    Row("negative_timeout=T", "accepted", "likewise"),
    Row("attr_timeout=T", "accepted", "likewise"),
    Row("ac_attr_timeout=T", "accepted", "likewise"),
    Row("noforget", "accepted", "`dcache_max_size` says how many names are kept"),
    Row("remember=T", "accepted", "likewise"),
    Row("modules=M1[:M2...]", "replaced", "the directory behind the host's colon"),
    Row("subdir=DIR", "replaced", "the directory behind the host's colon"),
    Row("[no]rellinks", "replaced", "`transform_symlinks`"),
    Row("from_code=CHARSET", "refused", "names are bytes, and left as they are"),
    Row("to_code=CHARSET", "refused", "names are bytes, and left as they are"),
    Row("allow_other", "same", ""),
    Row("allow_root", "same", ""),
    Row("auto_unmount", "accepted", "a dead mount is safer for backups than an empty directory"),
    # mount.fuse(8)'s, which sshfs takes without listing them
    Row("default_permissions", "same", ""),
    Row("fsname=NAME", "same", ""),
    Row("subtype=NAME", "same", ""),
    Row("max_read=N", "same", ""),
    Row("ro", "same", ""),
    Row("[no]suid, [no]dev, [no]exec, [no]atime", "same", ""),
    Row("setuid=USER", "same", ""),
    Row("drop_privileges", "replaced", "`setuid=USER`"),
)  # fmt: skip
