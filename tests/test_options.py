"""options and option_values: the command line, one word at a time, and whatever a fuzzer makes of it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Dict, List, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftpmount import options
from sftpmount.errors import UsageError
from sftpmount.options import MiB, MountOptions, SshOptions, parse

PLACE = ["user@host:dir", "/mnt"]
DEFAULTS = parse(PLACE)


def changed(*argv: str) -> Dict[str, Any]:
    """The fields that ``argv`` gives another value than the defaults; those of ssh have its name before them."""
    found = parse([*PLACE, *argv])
    fields = {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(MountOptions)
        if field.name != "ssh" and getattr(found, field.name) != getattr(DEFAULTS, field.name)
    }
    for field in dataclasses.fields(SshOptions):
        if getattr(found.ssh, field.name) != getattr(DEFAULTS.ssh, field.name):
            fields["ssh." + field.name] = getattr(found.ssh, field.name)
    return fields


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        # flags
        ("-p 2222", {"ssh.port": 2222}),
        ("-p2222", {"ssh.port": 2222}),
        ("-F none", {"ssh.config_file": "none"}),
        ("-f", {"foreground": True}),
        ("-d", {"foreground": True, "debug": True, "log_level": "debug"}),
        ("-v", {"log_level": "debug"}),
        ("-o core_dumps", {"core_dumps": True}),
        # what mount(8) makes of an fstab line without, and with, a word on the matter
        ("-o rw,noatime,dev,suid", {"fuse_options": (("noatime", ""),)}),
        ("-o rw,nosuid,nodev", {"fuse_options": (("nosuid", ""), ("nodev", ""))}),
        ("-o suid,dev", {"fuse_options": (("suid", ""), ("dev", ""))}),
        ("-fo ro", {"foreground": True, "ro": True}),
        ("-s -n -t fuse.sftpmount -C", {}),
        ("-r", {"ro": True}),
        ("-r -w", {}),
        # connection
        ("-o port=2222", {"ssh.port": 2222}),
        ("-o PORT=2222", {"ssh.port": 2222}),
        ("-o port=1,port=2", {"ssh.port": 2}),
        ("-o ssh_config=/a/b", {"ssh.config_file": "/a/b"}),
        ("-o ProxyJump=a@b:3", {"ssh.ssh_options": (("proxyjump", "a@b:3"),)}),
        ("-o ConnectTimeout=1m30s", {"ssh.connect_timeout_s": 90.0}),
        ("-o ServerAliveInterval=5", {"server_alive_interval_s": 5.0}),
        ("-o ServerAliveCountMax=7", {"server_alive_count_max": 7}),
        ("-o retry_timeout=hard", {"retry_timeout_s": None}),
        ("-o retry_timeout=0", {"retry_timeout_s": 0.0}),
        ("-o retry_timeout=2h", {"retry_timeout_s": 7200.0}),
        ("-o lanes=1", {"lanes": 1}),
        ("-o reconnect,delay_connect,max_conns=4", {}),
        # trust and login
        ("-o security=pq", {"ssh.security": "pq"}),
        ("-o StrictHostKeyChecking=yes", {"ssh.strict_host_key_checking": "yes"}),
        ("-o stricthostkeychecking=ask", {"ssh.strict_host_key_checking": "yes"}),
        ("-o StrictHostKeyChecking=accept-new", {"ssh.strict_host_key_checking": "accept-new"}),
        ("-o UserKnownHostsFile=/b,UserKnownHostsFile=/a", {"ssh.known_hosts_files": ("/a",)}),
        (["-o", 'UserKnownHostsFile=/a "/b c"'], {"ssh.known_hosts_files": ("/a", "/b c")}),
        (r"-o Ciphers=a@b\,c", {"ssh.ciphers": "a@b,c"}),
        ("-o MACs=^x,KexAlgorithms=-y,HostKeyAlgorithms=z*",
         {"ssh.macs": "^x", "ssh.kex_algorithms": "-y", "ssh.host_key_algorithms": "z*"}),
        ("-o IdentityFile=/a,IdentityFile=/b", {"ssh.identity_files": ("/a", "/b")}),
        ("-o password_stdin", {"ssh.password_stdin": True}),
        ("-o BatchMode=yes", {"ssh.batch_mode": True}),
        ("-o IdentitiesOnly=yes,IdentityAgent=/s",
         {"ssh.ssh_options": (("identitiesonly", "yes"), ("identityagent", "/s"))}),
        (["-o", r"ProxyCommand=nc -X 5 %h\, %p"], {"ssh.ssh_options": (("proxycommand", "nc -X 5 %h, %p"),)}),
        ("-o User=user", {}),
        # storing and caching
        ("-o commit=fsync", {"commit": "fsync"}),
        ("-o dirty_size=1G", {"dirty_bytes_max": 1024 * MiB}),
        ("-o cache_size=128MiB", {"cache_bytes_max": 128 * MiB}),
        ("-o cache_size=2097152", {"cache_bytes_max": 2 * MiB}),
        ("-o read_ahead=512k", {"read_ahead_bytes_max": 512 * 1024}),
        ("-o read_ahead=0", {"read_ahead_bytes_max": 0}),
        ("-o no_readahead", {"read_ahead_bytes_max": 0}),
        ("-o dcache_timeout=5", {"dir_cache_timeout_s": 5.0}),
        ("-o cache_timeout=5", {"dir_cache_timeout_s": 5.0}),
        ("-o dcache_stat_timeout=3,cache_dir_timeout=9", {"dir_cache_timeout_s": 9.0}),
        ("-o dcache_timeout=5,dcache_dir_timeout=9", {"dir_cache_timeout_s": 5.0}),
        ("-o dir_cache=no", {"dir_cache_timeout_s": 0.0}),
        ("-o cache=no,dcache_timeout=5", {"dir_cache_timeout_s": 0.0}),
        ("-o cache=yes", {}),
        ("-o dcache_max_size=1000", {"entries_max": 1000}),
        # what is shown
        ("-o ro,rw", {}),
        ("-o uid=1000,gid=100,umask=077", {"uid": 1000, "gid": 100, "umask": 0o77}),
        ("-o idmap=user", {"idmap": "user"}),
        ("-o contain_symlinks,transform_symlinks", {"contain_symlinks": True, "transform_symlinks": True}),
        ("-o contain_symlinks,no_contain_symlinks", {}),
        ("-o allow_other,default_permissions", {"allow_other": True, "default_permissions": True}),
        ("-o allow_root,nonempty", {"allow_root": True, "nonempty": True}),
        (r"-o fsname=a\,b\\c,subtype=t", {"fsname": r"a,b\c", "subtype": "t"}),
        (r"-o fsname=a\054b\040c", {"fsname": "a,b c"}),
        ("-o max_read=65536,noatime,nosuid",
         {"fuse_options": (("max_read", "65536"), ("noatime", ""), ("nosuid", ""))}),
        # the process
        ("-o setuid=joe", {"setuid": "joe"}),
        ("-o log_file=/l,log_level=warning", {"log_file": "/l", "log_level": "warning"}),
        # what means nothing here
        ("-o", None),
        ("-o ,,", {}),
        ("-o defaults,_netdev,noauto,user,users,nofail,x-systemd.automount,x-gvfs-show,comment=x,user=joe", {}),
        ("-o kernel_cache,auto_cache,big_writes,large_read,workaround=rename:nofstat,workaround=all", {}),
        ("-o ControlPath=none,Compression=yes,CheckHostIP=no,Protocol=2,sftp_server=sftp", {}),
    ],
)  # fmt: skip
def test_words(argv: Any, expected: Any) -> None:
    words = argv if isinstance(argv, list) else argv.split(" ")
    if expected is None:
        with pytest.raises(UsageError):
            parse([*PLACE, *words])
        return
    assert changed(*words) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("reconect", "option 'reconect' is not known: the nearest is reconnect."),
        ("identityfiles=/x", "option 'identityfiles' is not known: the nearest is IdentityFile."),
        ("xyzzy=geheim", "option 'xyzzy' is not known: sftpmount --help shows what there is."),
        ("password=geheim", "option password is refused: everyone could read it in the process list; write password_stdin"),
        ("port=0", "option Port: '0' is not a whole number from 1 to 65535."),
        ("port=22x", "option Port: '22x' is not a whole number"),
        ("port=٣", "is not a whole number"),
        ("port", "option Port needs a value: write Port=VALUE."),
        ("port=", "option Port needs a value"),
        ("ro=yes", "option ro takes no value: write only ro."),
        ("nosuid=1", "option nosuid takes no value"),
        ("commit=always", "option commit: 'always' is not one of close, fsync."),
        ("idmap=file", "option idmap: 'file' is not one of none, user."),
        ("umask=9", "option umask: '9' is not an octal number up to 777."),
        ("umask=7777", "is not an octal number"),
        ("uid=joe", "option uid: 'joe' is not a whole number"),
        ("dirty_size=1", "option dirty_size: '1' is not a size such as 64M, of at least 1M."),
        ("cache_size=9Q", "option cache_size: '9Q' is not a size"),
        ("cache_size=99999T", "is not a size"),
        ("retry_timeout=soft", "option retry_timeout: 'soft' is not a time such as 20, 1m30s, hard."),
        ("retry_timeout=-1", "is not a time"),
        ("retry_timeout=nan", "is not a time"),
        ("ServerAliveInterval=0", "0 is too short, the least is 1; to wait without end write retry_timeout=hard."),
        ("StrictHostKeyChecking=no", "is refused, since anyone could then pose as the server: write StrictHost"),
        ("StrictHostKeyChecking=off", "is refused"),
        ("StrictHostKeyChecking=maybe", "is not one of yes, accept-new"),
        ("NoHostAuthenticationForLocalhost=yes", "every host key is checked"),
        ("Ciphers=a b", "is not a list of algorithm names"),
        ("allow_other,allow_root", "options allow_other and allow_root exclude each other"),
        ("follow_symlinks", "option follow_symlinks is refused: a link to a parent would be a tree without end"),
        ("contain_symlinks=yes", "takes no value"),
        ("directport=1", "would not be encrypted"),
        ("ssh_command=ssh -v", "option ssh_command is refused"),
        ("ssh_protocol=1", "only SSH 2 is spoken"),
        ("PKCS11Provider=/x.so", "write IdentityAgent=SOCKET instead"),
        ("workaround=nonsense", "option workaround: 'nonsense' is not one of sshfs's workarounds."),
        ("remount", "unmount it and mount it again"),
        ("drop_privileges", "write setuid=USER instead"),
        ("nosymfollow", "write contain_symlinks instead"),
        ("modules=subdir", "write the directory behind the host's colon"),
        ("User=joe", "option User=joe contradicts user in the place: write one."),
        ("User=-oProxyCommand=x", "cannot be a user's name"),
        ("fsname=a\x1bb", "holds a control character"),
        (r"fsname=a\012b", "holds a control character"),
    ],
)  # fmt: skip
def test_refused_words(words: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([*PLACE, "-o", words])
    assert sentence in str(caught.value)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "nothing to mount"),
        (["host:"], "no mountpoint: write the directory to mount on behind 'host:'."),
        (["host:", ""], "is no mountpoint"),
        (["host:", "/a", "/b"], "'/b' is a word too many"),
        (["status"], "'status' is neither a command nor [user@]host:[dir]: see sftpmount --help."),
        (
            ["status", "/mnt"],
            "'status' is not of the form [user@]host:[dir]: write status: for a host of that name.",
        ),
        (["-x"], "option -x not recognized"),
        (["--fuse"], "option --fuse not recognized"),
        (["-1", *PLACE], "only SSH 2"),
        ([*PLACE, "-p"], "option -p requires argument"),
        (["sftp://user@host:2222/", "/mnt", "-p", "22"], "option Port=22 contradicts 2222"),
    ],
)
def test_refused_command_lines(argv: List[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(argv)
    assert sentence in str(caught.value)


def test_options_may_stand_before_between_and_after() -> None:
    expected = parse(["u@h:d", "/mnt", "-o", "ro", "-p", "5"])
    assert parse(["-o", "ro", "u@h:d", "-p", "5", "/mnt"]) == expected
    assert parse(["-oro", "-p5", "--", "u@h:d", "/mnt"]) == expected
    assert expected.ssh.port == 5 and expected.ro and expected.fsname == "u@h:d"


def test_help_and_version_are_seen_whatever_else_is_said() -> None:
    assert options.split(["--help"]).help and not options.split(["--help"]).version
    assert options.split(["a", "-h", "-o", "nonsense"]).help
    assert options.split(["-V"]).version


def test_names_are_unique_and_fields_exist() -> None:
    names = [option.name for option in options.OPTIONS]
    assert len(names) == len(set(names))
    keywords = [name.lower() for name in names if name != name.lower()]
    assert len(keywords) == len(set(keywords))
    fields = {field.name for field in dataclasses.fields(MountOptions)}
    fields |= {"ssh." + field.name for field in dataclasses.fields(SshOptions)}
    assert {option.field for option in options.OPTIONS if option.field} - fields == {
        "separate_timeout_s",
        "dir_cache",
    }


def test_every_option_is_taken_without_effect_or_refused_with_a_reason() -> None:
    for option in options.OPTIONS:
        assert option.help, option.name
        if option.verdict == "refused":
            with pytest.raises(UsageError, match=f"option {option.name} is refused: "):
                parse([*PLACE, "-o", f"{option.name}=not-{option.value}"])
        if option.verdict == "without effect":
            assert changed("-o", f"{option.name}=none") == {}
    assert {option.verdict for option in options.OPTIONS} == {"taken", "without effect", "refused"}


def test_every_field_can_be_set_from_the_command_line() -> None:
    settable = {option.field for option in options.OPTIONS} | {"ssh", "directory", "mountpoint", "ssh.host"}
    fields = {field.name for field in dataclasses.fields(MountOptions)}
    fields |= {"ssh." + field.name for field in dataclasses.fields(SshOptions)}
    assert fields - settable == set()


def test_every_kept_or_refused_option_explains_itself() -> None:
    for _, group in options.GROUPS:
        for option in group:
            assert option.help and option.field, option.name


def test_help_names_the_defaults() -> None:
    """A number in round brackets at the end of a help text is the field's default."""
    seen = 0
    for _, group in options.GROUPS:
        for option in group:
            shown = re.search(r"\((\d+)(M?)\)$", option.help)
            if shown:
                owner = DEFAULTS.ssh if option.field.startswith("ssh.") else DEFAULTS
                default = getattr(owner, option.field.split(".")[-1])
                assert default == int(shown[1]) * (MiB if shown[2] else 1), option.name
                seen += 1
    assert seen >= 9


# What a process can be handed: text, and bytes that are none.
_characters = st.characters(exclude_categories=["Cs"]) | st.characters(
    min_codepoint=0xDC80, max_codepoint=0xDCFF
)


def _text(size: int) -> st.SearchStrategy[str]:
    return st.text(_characters, max_size=size)


_names = st.sampled_from([option.name for option in options.OPTIONS]) | _text(12)
_values = st.sampled_from(
    ["yes", "no", "1", "0", "64M", "hard", "none", "a,b", "\\", "1m", "", "-x"]
) | _text(20)
_words = st.builds(
    lambda name, equals, value: name + equals + value, _names, st.sampled_from(["", "="]), _values
)
_arguments = (
    st.sampled_from(
        [
            "-o",
            "-p",
            "-F",
            "-f",
            "-d",
            "-s",
            "-C",
            "-V",
            "--",
            "-",
            "--help",
            "user@host:dir",
            "/mnt",
            "[::1]:",
        ]
    )
    | _words
    | st.lists(_words, max_size=4).map(lambda words: "-o" + ",".join(words))
    | _text(30)
    | st.builds(lambda user, host, path: f"{user}@{host}:{path}", _text(8), _text(8), _text(8))
    | _text(20).map(lambda rest: "sftp://" + rest)
)


def holds_together(found: MountOptions) -> None:
    """What every result promises, whatever was typed."""
    assert found.ssh.host and not found.ssh.host.startswith("-") and found.ssh.host.isprintable()
    assert found.ssh.user is None or (found.ssh.user and not found.ssh.user.startswith("-"))
    assert b"\0" not in found.directory and "\0" not in found.mountpoint and found.mountpoint
    assert found.ssh.strict_host_key_checking in (None, "yes", "accept-new")
    assert found.dirty_bytes_max >= MiB and found.cache_bytes_max >= MiB and found.lanes >= 1
    for owner in (found, found.ssh):
        hints = get_type_hints(type(owner))
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            if hints[field.name] in (str, int, float, bool, bytes):
                assert isinstance(
                    value, (hints[field.name], int) if hints[field.name] is float else hints[field.name]
                )


@settings(max_examples=500, deadline=None)
@given(st.lists(_arguments, max_size=6))
def test_only_usage_errors_escape(argv: List[str]) -> None:
    try:
        found = parse(argv)
    except UsageError as error:
        assert str(error).endswith((".", ")")) and error.exit_status == 2
    else:
        holds_together(found)


@settings(max_examples=500, deadline=None)
@given(st.lists(_words, max_size=5))
def test_only_usage_errors_escape_from_words(words: List[str]) -> None:
    try:
        holds_together(parse([*PLACE, "-o", ",".join(words)]))
    except UsageError as error:
        assert str(error).endswith((".", ")"))
