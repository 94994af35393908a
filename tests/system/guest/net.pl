# What tests do with the network from inside a machine, with what every Debian has. The first argument says what:
#   ask [TIMEOUT] tcp|udp/ADDRESS/PORT...   one line each, in order: what was answered (tcp: its first line), or why nothing was
#   frames HEX...                           out of eth0, as they are
#   mac ADDRESS                             of the neighbour, as the kernel knows it
#   serve PORT WORD                         answers TCP and UDP with WORD and who asks; then what TCP says comes back
#   drain ADDRESS PORT FILE                 FILE has the number of bytes that have come, then why no more do
#   flood ADDRESS PORT                      a datagram with a number each 20 ms
use strict; use warnings; use Socket; use IO::Select;
$| = 1;
my $do = shift;
my %kind = (tcp => SOCK_STREAM, udp => SOCK_DGRAM);

sub opened { my ($kind, $address, $port) = @_;
    socket(my $s, AF_INET, $kind{$kind}, 0) or die "$!";
    connect($s, pack_sockaddr_in($port, inet_aton($address))) or return "$!";
    return $s;
}

sub ask { my ($kind, $address, $port) = split m{/}, $_[0];
    my $s = opened($kind, $address, $port);
    return $s unless ref $s;
    if ($kind eq "udp") { defined send($s, "?", 0) or return "$!" }
    defined sysread($s, my $data, 200) or return "$!";
    $data =~ s/\n.*//s;
    return $data;
}

sub put { my ($file, $text) = @_;
    open(my $f, ">", "$file.new") or die "$!"; print $f $text; close $f; rename "$file.new", $file;
}

if ($do eq "ask") {
    my $timeout = $ARGV[0] =~ m{/} ? 2 : shift;
    my @pipes = map { my $what = $_;
        pipe(my $read, my $write) or die "$!";
        if (!fork) {
            $SIG{ALRM} = sub { syswrite $write, "timeout"; exit };
            alarm $timeout; my $said = ask($what); alarm 0; syswrite $write, $said; exit;
        }
        close $write; $read
    } @ARGV;
    for my $pipe (@pipes) { local $/; my $said = <$pipe>; print "$said\n" }
} elsif ($do eq "frames") {
    socket(my $s, 17, SOCK_RAW, 0x0300) or die "$!";
    open(my $f, "<", "/sys/class/net/eth0/ifindex") or die "$!"; chomp(my $index = <$f>);
    for (@ARGV) {
        my $frame = pack "H*", $_;
        defined send($s, $frame, 0, pack("S n i S C C a8", 17, unpack("x12 n", $frame), $index, 1, 0, 6, $frame)) or die "$!";
    }
} elsif ($do eq "mac") {
    send(opened("udp", $ARGV[0], 9), "?", 0);
    for (1 .. 100) {
        open(my $f, "<", "/proc/net/arp") or die "$!";
        for (<$f>) { my @word = split; if ($word[0] eq $ARGV[0] and $word[2] eq "0x2") { print "$word[3]\n"; exit } }
        select undef, undef, undef, 0.05;
    }
    die "nobody has $ARGV[0]";
} elsif ($do eq "serve") {
    my ($port, $word) = @ARGV;
    my ($tcp, $udp);
    for ([\$tcp, SOCK_STREAM], [\$udp, SOCK_DGRAM]) {
        socket(${$_->[0]}, AF_INET, $_->[1], 0) or die "$!";
        setsockopt(${$_->[0]}, SOL_SOCKET, SO_REUSEADDR, 1);
        bind(${$_->[0]}, pack_sockaddr_in($port, INADDR_ANY)) or die "$!";
    }
    listen($tcp, 64) or die "$!";
    print "ready\n";
    my $all = IO::Select->new($tcp, $udp);
    while (1) {
        for my $one ($all->can_read) {
            if ($one == $tcp) {
                my $peer = accept(my $s, $tcp) or next;
                syswrite $s, "$word " . inet_ntoa((unpack_sockaddr_in $peer)[1]) . "\n";
                $all->add($s);
            } elsif ($one == $udp) {
                my $peer = recv($udp, my $data, 2000, 0);
                defined $peer and send($udp, "$word " . inet_ntoa((unpack_sockaddr_in $peer)[1]), 0, $peer);
            } else {
                my $data;
                if (!sysread($one, $data, 65536) or !syswrite($one, $data)) { $all->remove($one); close $one }
            }
        }
    }
} elsif ($do eq "drain") {
    my ($address, $port, $file) = @ARGV;
    my ($s, $n, $why) = (opened("tcp", $address, $port), 0, "closed");
    if (!ref $s) { put($file, "0 $s"); exit }
    while (1) {
        my $got = sysread($s, my $data, 65536);
        if (!defined $got) { $why = "$!"; last }
        last unless $got;
        put($file, $n += $got);
    }
    put($file, "$n $why");
} elsif ($do eq "flood") {
    my ($address, $port) = @ARGV; my $n = 0;
    my $s = opened("udp", $address, $port);
    while (1) { send($s, $n++, 0); select undef, undef, undef, 0.02 }
} else { die "what?" }
