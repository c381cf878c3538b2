#!/bin/sh
# Prints a Python that hashml runs on: python3 if it is 3.11 or later, else the first later one found.
# With --newer: one newer than that, for testing against the newest jax; nothing if there is none.
set -u

minor() { "$1" -c 'import sys; print(sys.version_info[0] * 100 + sys.version_info[1])' 2>/dev/null; }

fits() { # command, least, most
    version=$(minor "$1") && [ -n "$version" ] && [ "$version" -ge "$2" ] && [ "$version" -le "$3" ]
}

candidates="python3 python3.11 python3.12 python3.13 python3.14"
for folder in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin; do
    [ -x "$folder/python" ] && candidates="$candidates $folder/python"
done

base=""
for command in $candidates; do
    if fits "$command" 311 399; then base=$command; break; fi
done
if [ "${1:-}" != "--newer" ]; then
    [ -n "$base" ] && echo "$base"
    exit 0
fi
[ -n "$base" ] || exit 0
base_minor=$(minor "$base")
for command in $candidates; do
    if fits "$command" $((base_minor + 1)) 399; then echo "$command"; exit 0; fi
done
