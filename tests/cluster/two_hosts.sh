#!/usr/bin/env bash
# Two hosts on this machine, as network namespaces joined by a cable: two_hosts.sh up|down|cut NAME, with NAME a short word of its own.
# Inside, they are NAME-a with 10.77.0.1 and NAME-b with 10.77.0.2.
set -euo pipefail
name=$2
case $1 in
  up)
    for host in a b; do ip netns add "$name-$host"; done
    ip link add "$name-a" type veth peer name "$name-b"
    for host in a b; do
      ip link set "$name-$host" netns "$name-$host"
      ip -n "$name-$host" addr add "10.77.0.$([[ $host == a ]] && echo 1 || echo 2)/24" dev "$name-$host"
      ip -n "$name-$host" link set "$name-$host" up
      ip -n "$name-$host" link set lo up
    done
    ;;
  cut) ip -n "$name-a" link set "$name-a" down ;;
  down) for host in a b; do ip netns delete "$name-$host" 2>/dev/null || true; done ;;
esac
