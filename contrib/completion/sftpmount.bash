# bash completion for sftpmount; written by contrib/documents from sftpmount.bash.in and the table of options.

_sftpmount_options=(
    Port=
    ssh_config=
    ProxyJump=
    ConnectTimeout=
    ServerAliveInterval=
    ServerAliveCountMax=
    retry_timeout=
    lanes=
    security=
    StrictHostKeyChecking=
    UserKnownHostsFile=
    Ciphers=
    IdentityFile=
    password_stdin
    BatchMode=
    commit=
    dirty_size=
    cache_size=
    read_ahead=
    dcache_timeout=
    dcache_max_size=
    ro
    uid=
    umask=
    idmap=
    contain_symlinks
    transform_symlinks
    allow_other
    default_permissions
    nonempty
    fsname=
    setuid=
    log_file=
    log_level=
    MACs=
    KexAlgorithms=
    HostKeyAlgorithms=
    User=
    rw
    gid=
    allow_root
    subtype=
    core_dumps
    foreground
    debug
    no_readahead
    cache_max_size=
    cache_timeout=
    dcache_stat_timeout=
    dcache_link_timeout=
    dcache_dir_timeout=
    cache_stat_timeout=
    cache_link_timeout=
    cache_dir_timeout=
    dir_cache=
    cache=
    AddressFamily=
    BindAddress=
    BindInterface=
    CanonicalDomains=
    CanonicalizeFallbackLocal=
    CanonicalizeHostname=
    CanonicalizeMaxDots=
    CanonicalizePermittedCNAMEs=
    CASignatureAlgorithms=
    CertificateFile=
    ChallengeResponseAuthentication=
    ConnectionAttempts=
    GlobalKnownHostsFile=
    HashKnownHosts=
    HostKeyAlias=
    HostName=
    IdentitiesOnly=
    IdentityAgent=
    IPQoS=
    KbdInteractiveAuthentication=
    NumberOfPasswordPrompts=
    PasswordAuthentication=
    PreferredAuthentications=
    ProxyCommand=
    PubkeyAcceptedAlgorithms=
    PubkeyAcceptedKeyTypes=
    PubkeyAuthentication=
    RekeyLimit=
    RequiredRSASize=
    RevokedHostKeys=
    TCPKeepAlive=
    no_contain_symlinks
    max_read=
    suid
    nosuid
    dev
    nodev
    exec
    noexec
    atime
    noatime
    sync
    async
    dirsync
)

# Names that ssh_config and known_hosts files hold, but no patterns and no hashes.
_sftpmount_hosts() {
    cat ~/.ssh/config /etc/ssh/ssh_config 2>/dev/null |
        awk 'tolower($1) == "host" { for (i = 2; i <= NF; i++) if ($i !~ /[*?!]/) print $i }'
    cat ~/.ssh/known_hosts /etc/ssh/ssh_known_hosts 2>/dev/null |
        awk '$1 ~ /^@/ { $1 = $2 } $1 !~ /^[|#]/ { n = split($1, names, ","); for (i = 1; i <= n; i++) print names[i] }' |
        sed -n 's/^\[\(.*\)\]:[0-9]*$/\1/; /[*?!]/!p'
}

_sftpmount() {
    local line word before words='' files='' prefix='' name value
    # bash splits words at "=" and ":" as well; what counts here are blanks.
    line=${COMP_LINE:0:COMP_POINT}
    word=${line##*[[:blank:]]}
    before=${line%"$word"}
    before=${before%"${before##*[![:blank:]]}"}
    before=${before##*[[:blank:]]}
    COMPREPLY=()
    if [[ $word == -o?* ]]; then
        prefix=-o word=${word#-o} before=-o
    fi
    case $before in
        -o)
            prefix+=${word%"${word##*,}"}
            word=${word##*,}
            name=${word%%=*} value=${word#*=}
            if [[ $word == *=* ]]; then
                case $name in
        retry_timeout) words='hard' ;;
        security) words='hardened compatible pq' ;;
        StrictHostKeyChecking) words='yes accept-new' ;;
        BatchMode) words='yes no' ;;
        commit) words='close fsync' ;;
        idmap) words='none user' ;;
        log_level) words='error warning info debug' ;;
        dir_cache) words='yes no' ;;
        cache) words='yes no' ;;
        ssh_config|UserKnownHostsFile|IdentityFile|log_file) files=yes ;;
                esac
                prefix+=$name=
                word=$value
            else
                words=${_sftpmount_options[*]}
                compopt -o nospace
            fi
            ;;
        -F) files=yes ;;
        -p) ;;
        *)
            case $word in
                -*) words='-o -p -F -f -d -v -r -h -V --help --version --foreground --debug --verbose' ;;
                *:* | */* | .* | ~*) files=directories ;;
                *)
                    if [[ $line == *:*[[:blank:]]* ]]; then
                        files=directories
                    else
                        [[ $word == *@* ]] && prefix=${word%@*}@ word=${word##*@}
                        words=$(_sftpmount_hosts | sed 's/$/:/')
                        [[ -z $prefix && $COMP_CWORD -eq 1 ]] && words+=' audit'
                        compopt -o nospace
                    fi
                    ;;
            esac
            ;;
    esac
    case $files in
        yes) mapfile -t COMPREPLY < <(compgen -f -P "$prefix" -- "$word"); compopt -o filenames ;;
        directories) mapfile -t COMPREPLY < <(compgen -d -- "$word"); compopt -o filenames ;;
        *) mapfile -t COMPREPLY < <(compgen -P "$prefix" -W "$words" -- "$word" | sort -u) ;;
    esac
    # bash puts a choice in the place of what stands behind the last of its own breaks.
    word=$prefix$word
    if [[ $word == *[=:]* ]]; then
        prefix=${word%"${word##*[=:]}"}
        COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    fi
}

complete -F _sftpmount sftpmount
