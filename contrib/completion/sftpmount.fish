# fish completion for sftpmount; written by contrib/documents from sftpmount.fish.in and the table of options.

function __sftpmount_options
    set -l begun (string replace --regex '[^,]*$' '' -- (commandline --current-token | string replace --regex '^-o' ''))
    printf "$begun%s\t%s\n" \
        Port= 'the servers port; also -p N' \
        ssh_config= 'in place of ~/.ssh/config; also -F FILE' \
        ProxyJump= 'go through this host, itself verified' \
        ConnectTimeout= 'to connect and log in (30)' \
        ServerAliveInterval= 'ask a silent server for a sign of life (15)' \
        ServerAliveCountMax= 'then reconnect (3)' \
        retry_timeout= 'how long programs wait through an outage (300)' \
        lanes= 'SFTP channels on the connection, at most (6)' \
        security= 'algorithms (hardened by default)' \
        StrictHostKeyChecking= 'or trust new hosts (yes)' \
        UserKnownHostsFile= 'in place of ~/.ssh/known_hosts' \
        Ciphers= 'also MACs, KexAlgorithms, HostKeyAlgorithms' \
        IdentityFile= 'a private key; may be said again' \
        password_stdin 'the first line of stdin is the password' \
        BatchMode= 'never ask for a password (no)' \
        commit= 'which of them puts a file on the servers disk' \
        dirty_size= 'written, not yet stored data (64M)' \
        cache_size= 'file data kept for reading (64M)' \
        read_ahead= 'fetched before it is asked for (8M)' \
        dcache_timeout= 'names are trusted for so long (20)' \
        dcache_max_size= 'names kept (200000)' \
        ro 'read only' \
        uid= 'shown as the owner; also gid=N' \
        umask= 'modes are shown without these bits' \
        idmap= 'user: the logins is shown as yours' \
        contain_symlinks 'refuse links that lead out of the mount' \
        transform_symlinks 'absolute links into the mount are relative' \
        allow_other 'to other users, too; also allow_root' \
        default_permissions 'the kernel checks modes' \
        nonempty 'hide what the mountpoint holds' \
        fsname= 'the name that mount and df show' \
        setuid= 'run as this user, if root starts it' \
        log_file= 'in place of syslog' \
        log_level= 'what is logged (info)' \
        metrics= 'kept up to date for node_exporter (.prom)' \
        MACs= 'those for message integrity, narrowed or in another order' \
        KexAlgorithms= 'those for the key exchange, likewise' \
        HostKeyAlgorithms= 'the types of host keys, likewise' \
        User= 'who logs in, as user@ before the host' \
        rw 'the contrary of ro' \
        gid= 'shown as the group' \
        allow_root 'to root, too, but to nobody else' \
        subtype= 'the type shown, behind fuse. (sftpmount)' \
        core_dumps 'a crash may leave a core, with keys and data in it' \
        foreground 'also -f' \
        debug 'also -d' \
        no_readahead 'read_ahead=0' \
        cache_max_size= 'older name of dcache_max_size' \
        cache_timeout= 'older name of dcache_timeout' \
        dcache_stat_timeout= 'the shortest of them is dcache_timeout' \
        dcache_link_timeout= 'the shortest of them is dcache_timeout' \
        dcache_dir_timeout= 'the shortest of them is dcache_timeout' \
        cache_stat_timeout= 'the shortest of them is dcache_timeout' \
        cache_link_timeout= 'the shortest of them is dcache_timeout' \
        cache_dir_timeout= 'the shortest of them is dcache_timeout' \
        dir_cache= 'with no as dcache_timeout=0' \
        cache= 'with no as dcache_timeout=0' \
        AddressFamily= 'as in ssh_config' \
        BindAddress= 'as in ssh_config' \
        BindInterface= 'as in ssh_config' \
        CanonicalDomains= 'as in ssh_config' \
        CanonicalizeFallbackLocal= 'as in ssh_config' \
        CanonicalizeHostname= 'as in ssh_config' \
        CanonicalizeMaxDots= 'as in ssh_config' \
        CanonicalizePermittedCNAMEs= 'as in ssh_config' \
        CASignatureAlgorithms= 'as in ssh_config' \
        CertificateFile= 'as in ssh_config' \
        ChallengeResponseAuthentication= 'as in ssh_config' \
        ConnectionAttempts= 'as in ssh_config' \
        GlobalKnownHostsFile= 'as in ssh_config' \
        HashKnownHosts= 'as in ssh_config' \
        HostKeyAlias= 'as in ssh_config' \
        HostName= 'as in ssh_config' \
        IdentitiesOnly= 'as in ssh_config' \
        IdentityAgent= 'as in ssh_config' \
        IPQoS= 'as in ssh_config' \
        KbdInteractiveAuthentication= 'as in ssh_config' \
        NumberOfPasswordPrompts= 'as in ssh_config' \
        PasswordAuthentication= 'as in ssh_config' \
        PreferredAuthentications= 'as in ssh_config' \
        ProxyCommand= 'as in ssh_config' \
        PubkeyAcceptedAlgorithms= 'as in ssh_config' \
        PubkeyAcceptedKeyTypes= 'as in ssh_config' \
        PubkeyAuthentication= 'as in ssh_config' \
        RekeyLimit= 'as in ssh_config' \
        RequiredRSASize= 'as in ssh_config' \
        RevokedHostKeys= 'as in ssh_config' \
        TCPKeepAlive= 'as in ssh_config' \
        no_contain_symlinks 'as is the default' \
        max_read= 'the kernels longest read, in bytes' \
        suid 'as in mount(8)' \
        nosuid 'as in mount(8)' \
        dev 'as in mount(8)' \
        nodev 'as in mount(8)' \
        exec 'as in mount(8)' \
        noexec 'as in mount(8)' \
        atime 'as in mount(8)' \
        noatime 'as in mount(8)' \
        sync 'as in mount(8)' \
        async 'as in mount(8)' \
        dirsync 'as in mount(8)' \
        help 'a line for each option'
end

function __sftpmount_places
    set -l user (string match --regex '^.*@' -- (commandline --current-token))
    printf "$user%s:\n" (__fish_print_hostnames)
end

complete -c sftpmount -f
complete -c sftpmount -s o -x -a '(__sftpmount_options)' -d 'options'
complete -c sftpmount -s p -x -d 'port'
complete -c sftpmount -s F -r -F -d 'in place of ~/.ssh/config'
complete -c sftpmount -s f -l foreground -d 'stay in the foreground'
complete -c sftpmount -s d -l debug -d 'log everything, in the foreground'
complete -c sftpmount -s v -l verbose -d 'log more'
complete -c sftpmount -s r -d 'read only'
complete -c sftpmount -s h -l help -d 'an overview'
complete -c sftpmount -s V -l version -d 'the version'
complete -c sftpmount -n 'not __fish_seen_subcommand_from audit status sync umount; and not string match -q "*:*" -- (commandline -opc)' -a '(__sftpmount_places) audit status sync umount'
complete -c sftpmount -n 'string match -q "*:*" -- (commandline -opc)' -a '(__fish_complete_directories)'
complete -c sftpmount -n '__fish_seen_subcommand_from audit' -a '(__sftpmount_places)'
complete -c sftpmount -n '__fish_seen_subcommand_from status sync umount' -a '(findmnt -nlo TARGET -t fuse.sftpmount)'
complete -c sftpmount -n '__fish_seen_subcommand_from status' -l watch -d 'time and again'
complete -c sftpmount -n '__fish_seen_subcommand_from audit status' -l json -d 'for a program'
