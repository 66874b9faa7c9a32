#!/bin/sh
# Writes the options that dockerd needs to put its containers into this host's subnet, from the file that flanneld writes.
# Options and output are those of the original's script of this name; `flanneld docker-opts` does the same without a shell.
set -eu

usage() {
  cat >&2 <<USAGE
$0 [-f SUBNET-FILE] [-d DOCKER-FILE] [-i] [-c] [-m] [-k NAME]

Writes Docker's options from flanneld's subnet file.
  -f  the subnet file; /run/flannel/subnet.env by default
  -d  the file to write; /run/docker_opts.env by default
  -i  only a variable for each option (DOCKER_OPT_MTU="--mtu=1472")
  -c  only one variable with all of them
  -k  the name of that one; DOCKER_OPTS by default
  -m  leave out --ip-masq
USAGE
  exit 1
}

fail() {
  printf '%s: %s\n' "$0" "$1" >&2
  exit 1
}

subnet_file=/run/flannel/subnet.env
docker_file=/run/docker_opts.env
key=DOCKER_OPTS
individual=false
combined=false
ip_masq=true

while getopts f:d:icmk: option; do
  case $option in
    f) subnet_file=$OPTARG ;;
    d) docker_file=$OPTARG ;;
    i) individual=true ;;
    c) combined=true ;;
    m) ip_masq=false ;;
    k) key=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[ $# = 0 ] || usage

case $key in
  '' | [0-9]* | *[!A-Za-z0-9_]*) fail "-k $key: give the name of a variable, such as DOCKER_OPTS" ;;
esac
if [ $individual = false ] && [ $combined = false ]; then
  individual=true
  combined=true
fi

# Only what the file says counts.
unset FLANNEL_SUBNET FLANNEL_MTU FLANNEL_IPMASQ
[ -r "$subnet_file" ] ||
  fail "cannot read $subnet_file: flanneld writes it when it is ready (\`systemctl status flanneld\`); -f names another one"
# A name without a slash would be looked for on the PATH.
case $subnet_file in
  */*) ;;
  *) subnet_file=./$subnet_file ;;
esac
# shellcheck disable=SC1090
. "$subnet_file"

if [ -n "${FLANNEL_SUBNET:-}" ]; then
  export DOCKER_OPT_BIP="--bip=$FLANNEL_SUBNET"
fi
if [ -n "${FLANNEL_MTU:-}" ]; then
  export DOCKER_OPT_MTU="--mtu=$FLANNEL_MTU"
fi
# One of the two masquerades what leaves the overlay. Docker's rule would do it to what stays inside, too.
if [ -n "${FLANNEL_IPMASQ:-}" ] && [ $ip_masq = true ]; then
  if [ "$FLANNEL_IPMASQ" = true ]; then
    export DOCKER_OPT_IPMASQ=--ip-masq=false
  else
    export DOCKER_OPT_IPMASQ=--ip-masq=true
  fi
fi

# Options that the environment or the file has already stay: each in its variable, and in front of the combined one's.
eval "all=\${$key:-}"
lines=
for name in $(set | sed -n 's/^\(DOCKER_OPT_[A-Za-z0-9_]*\)=.*/\1/p' | LC_ALL=C sort -u); do
  value=
  eval "value=\${$name:-}"
  all="$all $value"
  lines="$lines$name=\"$value\"
"
done

mkdir -p "$(dirname "$docker_file")"
{
  if [ $individual = true ]; then
    printf '%s' "$lines"
  fi
  if [ $combined = true ]; then
    printf '%s="%s"\n' "$key" "$all"
  fi
} >"$docker_file"
