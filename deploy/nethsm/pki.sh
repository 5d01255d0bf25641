#!/usr/bin/env bash
# Makes the certificates by which a NetHSM container and its etcd know each other, and the container's device key.
#
#   pki.sh make DIR [NAME…]          all of it, in the new folder DIR; NAMEs and IP addresses are further ones of etcd
#   pki.sh client DIR NAME           one more client certificate: DIR/NAME.crt and DIR/NAME.key
#   pki.sh renew DIR NAME [NAME…]    a new certificate for DIR/NAME.key, "server" or "client" say, with the names of the
#                                    old one and those given here. The key stays, so certificate and key always fit
#   pki.sh show DIR                  what there is, for whom, and until when
#
#   -d DAYS   how long certificates are valid (730)      -D DAYS   how long the CA is (3650)
#
# What `make` makes, all of it readable by you alone:
#   ca.crt, ca.key          the authority. Its key signs whoever may read and write the NetHSM's database: once all is
#                           made, move ca.key to a place that is not online
#   server.crt, server.key  etcd's. For serving and, because etcd calls itself with it, also for calling
#   client.crt, client.key  the NetHSM's
#   device_key              32 random bytes in base64: what ties the data in etcd to this NetHSM
#
# Nothing is ever overwritten but a certificate that is renewed. A run that fails or is interrupted leaves nothing.
set -euo pipefail
umask 077

usage() {
  sed -n '2,/^# Nothing/{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}
die() {
  printf 'pki.sh: %s\n' "$*" >&2
  exit 1
}

days=730 ca_days=3650
while getopts ':d:D:h' option; do
  case $option in
  d) days=$OPTARG ;;
  D) ca_days=$OPTARG ;;
  h) usage && exit ;;
  *) usage >&2 && exit 2 ;;
  esac
done
shift $((OPTIND - 1))
for number in "$days" "$ca_days"; do
  [[ $number =~ ^[1-9][0-9]{0,4}$ ]] || die "\"$number\" is not a number of days"
done
if (($# < 2)); then usage >&2 && exit 2; fi
command=$1 dir=${2%/}
shift 2
[[ $dir =~ ^[^-] ]] || die "\"$dir\" is no folder to work in; options come before the command"
command -v openssl >/dev/null || die 'openssl is not installed'

# Everything is made here, beside its place, and renamed into it when it is complete.
work=
trap 'if [[ -n $work ]]; then rm -rf "$work"; fi' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# run keeps openssl's chatter for the case that it fails.
run() {
  openssl "$@" >"$work/log" 2>&1 || die "openssl $1 failed: $(cat "$work/log")"
}

new_key() { run genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }

# serial is 127 random bits: positive, never zero, and of 16 bytes for everybody.
serial() { printf '0x4%s' "$(openssl rand -hex 16 | cut -c 2-)"; }

# alternative_names writes NAMEs as openssl wants them: DNS:etcd,IP:127.0.0.1
alternative_names() {
  local name list=
  for name in "$@"; do
    if [[ $name =~ ^[0-9]+(\.[0-9]+){3}$ || $name =~ ^[0-9a-fA-F:]*:[0-9a-fA-F:.]*$ ]]; then
      list+=,IP:$name
    elif [[ $name =~ ^(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$ ]]; then
      list+=,DNS:$name
    else
      die "\"$name\" is neither a host name nor an IP address"
    fi
  done
  printf '%s' "${list#,}"
}

# sign CA-FOLDER SUBJECT KEY USES NAMES CERTIFICATE signs a certificate for KEY.
sign() {
  local ca=$1 subject=$2 key=$3 uses=$4 names=$5 certificate=$6
  [[ -e $ca/ca.key ]] || die "there is no $ca/ca.key; bring the CA's key back from where you keep it, for this one command"
  # Nobody accepts a certificate whose CA has ended, however long it says that it is valid.
  openssl x509 -in "$ca/ca.crt" -noout -checkend $(((days * 24 - 1) * 3600)) >"$work/log" ||
    die "the CA ends before $days days are over, $(openssl x509 -in "$ca/ca.crt" -noout -enddate); fewer days, with -d, or a new CA"
  {
    printf 'basicConstraints = critical, CA:FALSE\n'
    printf 'keyUsage = critical, digitalSignature\n'
    printf 'extendedKeyUsage = %s\n' "$uses"
    printf 'subjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid\n'
    if [[ -n $names ]]; then printf 'subjectAltName = %s\n' "$names"; fi
  } >"$work/extensions"
  run req -new -config "$work/req.conf" -subj "$subject" -key "$key" -out "$work/request"
  run x509 -req -in "$work/request" -CA "$ca/ca.crt" -CAkey "$ca/ca.key" -set_serial "$(serial)" -sha256 -days "$days" \
    -extfile "$work/extensions" -out "$certificate"
  run verify -CAfile "$ca/ca.crt" "$certificate"
}

# workspace makes the folder to work in, on the file system of DIR.
workspace() {
  work=$(mktemp -d "$1.XXXXXX") || die "cannot write beside $dir"
  # The whole configuration: the machine's openssl.cnf may add extensions of its own.
  printf '[req]\nprompt = no\ndistinguished_name = subject\n[subject]\n' >"$work/req.conf"
  printf '[ca]\nbasicConstraints = critical, CA:TRUE, pathlen:0\nkeyUsage = critical, keyCertSign, cRLSign\n' >>"$work/req.conf"
  printf 'subjectKeyIdentifier = hash\n' >>"$work/req.conf"
}

# existing complains where DIR is not what `make` made.
existing() {
  [[ -e $dir/ca.crt ]] || die "there is no $dir/ca.crt; \"pki.sh make $dir\" makes all of it"
}

client_name() {
  [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$ ]] || die "\"$1\" is no name for a client: letters, digits, dashes and underscores"
  case $1 in ca | server | device_key) die "\"$1\" is the name of something else" ;; esac
}

make_all() {
  local names made
  # Checked first because it is kinder; the rename at the end is what guards against another run.
  if [[ -e $dir && -n $(ls -A "$dir" 2>&1) ]]; then
    die "$dir is there already and is left as it is. \"pki.sh renew\" renews a certificate, \"pki.sh client\" adds one"
  fi
  names=$(alternative_names etcd localhost 127.0.0.1 "$@")
  workspace "$dir.partial"
  made=$work/made
  mkdir "$made"

  new_key "$made/ca.key"
  run req -new -x509 -config "$work/req.conf" -extensions ca -subj "/CN=NetHSM etcd CA" -key "$made/ca.key" \
    -set_serial "$(serial)" -sha256 -days "$ca_days" -out "$made/ca.crt"
  new_key "$made/server.key"
  sign "$made" /CN=etcd "$made/server.key" 'serverAuth, clientAuth' "$names" "$made/server.crt"
  new_key "$made/client.key"
  sign "$made" /CN=nethsm "$made/client.key" clientAuth '' "$made/client.crt"
  openssl rand -base64 32 >"$made/device_key"

  mv -T "$made" "$dir" || die "$dir appeared meanwhile and is left as it is"
  cat <<END
Made, in $dir:

  ca.crt ca.key           the CA, valid for $ca_days days
  server.crt server.key   etcd, valid for $days days, as ${names//,/, }
  client.crt client.key   the NetHSM, valid for $days days
  device_key              the device key

Next:

  1. Keep a copy of device_key apart from this machine and from the backups of etcd. Without it the data in etcd is lost.
     Who has both lacks only the unlock passphrase; with unattended boot, nothing (README.md).
  2. A client more, for nitroseal's own values in an etcd of its kind:  pki.sh client $dir nitroseal
  3. Move ca.key off this machine. It is needed again to renew: put the date below in your calendar.
     $(openssl x509 -in "$dir/server.crt" -noout -enddate)
  4. docker compose -f compose.unix.yaml up -d
END
}

add_client() {
  local name=${1:?usage: pki.sh client DIR NAME}
  client_name "$name"
  existing
  if [[ -e $dir/$name.crt || -e $dir/$name.key ]]; then
    die "$dir/$name.crt or $name.key is there already and is left as it is; \"pki.sh renew $dir $name\" renews it"
  fi
  workspace "$dir/.partial"
  new_key "$work/key"
  sign "$dir" "/CN=$name" "$work/key" clientAuth '' "$work/certificate"
  # ln, unlike mv, refuses where another run was faster.
  ln "$work/key" "$dir/$name.key" || die "$dir/$name.key appeared meanwhile and is left as it is"
  ln "$work/certificate" "$dir/$name.crt"
  printf 'Made %s/%s.crt and .key, valid for %s days.\n' "$dir" "$name" "$days"
}

renew() {
  local name=${1:?usage: pki.sh renew DIR NAME [NAME…]} uses=clientAuth names='' subject container
  shift
  existing
  [[ $name != ca ]] || die 'the CA is not renewed but replaced, see README.md'
  [[ -e $dir/$name.crt && -e $dir/$name.key ]] || die "there is no $dir/$name.crt and .key to renew"
  if [[ $name == server ]]; then
    uses='serverAuth, clientAuth'
    names=$(openssl x509 -in "$dir/server.crt" -noout -ext subjectAltName | sed -n 's/^ *//; s/IP Address:/IP:/g; s/, /,/g; $p')
    if (($#)); then names+=,$(alternative_names "$@"); fi
    names=$(tr , '\n' <<<"$names" | awk '!seen[$0]++' | paste -sd ,)
  elif (($#)); then
    die 'only the certificate of a server has names'
  fi
  subject=$(openssl x509 -in "$dir/$name.crt" -noout -subject -nameopt RFC2253)
  workspace "$dir/.partial"
  sign "$dir" "/${subject#subject=}" "$dir/$name.key" "$uses" "$names" "$work/certificate"
  mv "$work/certificate" "$dir/$name.crt"
  printf 'Renewed %s/%s.crt, valid for %s days.\n' "$dir" "$name" "$days"
  case $name in
  server) container=etcd ;;
  client) container=nethsm ;;
  *) return ;; # whose it is knows its owner
  esac
  cat <<END
The running container still has the old one:

  docker compose -f compose.unix.yaml up -d --force-recreate $container

A NetHSM without unattended boot wants to be unlocked after its restart.
END
}

show() {
  local certificate
  existing
  for certificate in "$dir"/*.crt; do
    printf '%s\n' "$certificate"
    openssl x509 -in "$certificate" -noout -subject -enddate -ext extendedKeyUsage,subjectAltName 2>/dev/null | sed 's/^/  /'
    if ! openssl x509 -in "$certificate" -noout -checkend $((30 * 24 * 3600)) >/dev/null; then
      printf '  ENDS within 30 days, or has ended\n'
    fi
  done
}

case $command in
make) make_all "$@" ;;
client) add_client "$@" ;;
renew) renew "$@" ;;
show) show ;;
*) usage >&2 && exit 2 ;;
esac
