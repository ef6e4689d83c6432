"""What is said to a device's shell: any POSIX sh (dash, bash, mksh and toybox on Android, busybox).

The command line that travels is always the same, `BOOTSTRAP`, and means the same to any login shell (fish and csh
quote otherwise than sh). It reads one line of stdin, the script, every character but letters and digits an octal
escape; so names and arguments are data all the way, and the rest of stdin is free for a file's bytes.

Around each script stand marks with a random word. What a login shell prints of its own comes before the first and
is dropped; an answer without the last is a lost connection, whatever the client's exit code.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from qat_edge_devices.transport import Completed

BOOTSTRAP = """exec sh -c 'IFS= read -r s && eval "$(printf "$s")"'"""
BLOCK_BYTES = 65536  # of a sample
EXIT_ABSENT = 999  # no such program to run; no program can end with it

# A program in a session of its own. End of stdin (the other side closed it, or died) or $limit seconds end it with
# all its children; so does its own end. The file .pid.N lets the holder find it should this shell be killed.
# The two that watch are killed, not asked to end: mksh, Android's shell, may go on reading or waiting for good where a
# TERM comes just before, and hold stdout meanwhile. A sleep that is left behind so ends within its 3 s.
RUN = """\
cd "$run" || exit 125
command -v -- "$1" >/dev/null 2>&1 || { finish 999; exit; }
exec 3<&0
if command -v setsid >/dev/null 2>&1; then setsid "$@" </dev/null 3<&- &
else python3 -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' "$@" </dev/null 3<&- & fi
child=$!
: > ".pid.$child"
end_it() { kill -9 "-$child" || kill -9 "$child"; }
{ while IFS= read -r line <&3; do :; done; end_it; } >/dev/null 2>&1 &
watcher=$!
{ while [ "$limit" -gt 0 ]; do sleep 3 3<&- || exit; limit=$((limit - 3)); done; end_it; } >/dev/null 2>&1 &
timer=$!
{ wait "$child"; code=$?; kill -9 "-$child"; } 2>/dev/null
kill -9 "$watcher" "$timer" 2>/dev/null
rm -f ".pid.$child"
finish "$code"
"""

# The run folder lives as long as this: until stdin ends. Only processes whose folder it is are ended.
HOLD = """\
trap '' HUP PIPE
umask 077
{ mkdir -p "$root/cache" "$root/runs" && mkdir "$run"; } || exit 1
here=$(cd "$run" && pwd -P)
echo held
while IFS= read -r line; do :; done
for file in "$run"/.pid.*; do
  pid=${file##*.}
  [ "$(readlink "/proc/$pid/cwd")" = "$here" ] && kill -9 "-$pid"
done 2>/dev/null
for pause in 0 1 2 3 5; do sleep "$pause"; rm -rf "$run" 2>/dev/null && break; done
[ -e "$run" ] || echo removed
"""

# The root folder, in the first of the given places ($roots where none is given) that can be written to.
ROOT = """\
[ $# -gt 0 ] || set -- $roots
for base in "$@"; do [ -n "$base" ] && mkdir -p "$base" && [ -w "$base" ] && break; done 2>/dev/null
[ -w "$base" ] || { echo "none of these can be written to: $*" >&2; exit 1; }
umask 077
mkdir -p "$base/qat-edge" && cd "$base/qat-edge" || exit 1
[ -O . ] || { echo "$base/qat-edge belongs to somebody else" >&2; exit 1; }
pwd -P
"""

# openssl first: it uses the processor's own instructions for SHA-256, which many a sha256sum does not.
_DIGEST = """\
if command -v openssl >/dev/null 2>&1; then digest() { openssl dgst -sha256 -r; }
elif command -v sha256sum >/dev/null 2>&1; then digest() { sha256sum; }
elif command -v shasum >/dev/null 2>&1; then digest() { shasum -a 256; }
else echo 'neither sha256sum nor shasum nor openssl is there' >&2; exit 1; fi
"""

_SIZE = """\
size() { stat -c %s "$1" 2>/dev/null || wc -c <"$1"; }
"""

# Prints the salted digest of each file, "-" where there is none. $nonce: so that no digest can be known beforehand.
DIGEST = f"""\
{_DIGEST}for file in "$@"; do
  if [ -f "$file" ]; then {{ cat "$file"; printf %s "$nonce"; }} | digest | cut -c 1-64; else echo -; fi
done
"""

# The same of file $1 while it is written, read as it grows to $2 bytes; a file $1.end, or the loss of $run, ends it.
FOLLOW = f"""\
{_DIGEST}{_SIZE}pause() {{ [ -d "$run" ] && [ ! -e "$1.end" ] && {{ sleep 0.02 2>/dev/null || sleep 1; }}; }}
while [ ! -f "$1" ]; do pause "$1" || exit 1; done
{{
  at=0
  while there=$(size "$1") && [ "$there" -lt "$2" ]; do
    blocks=$((there / 1048576 - at))
    if [ "$blocks" -gt 0 ]; then dd if="$1" bs=1048576 skip="$at" count="$blocks" 2>/dev/null; at=$((at + blocks))
    else pause "$1" || exit 1; fi
  done
  dd if="$1" bs=1048576 skip="$at" 2>/dev/null
  printf %s "$nonce"
}} | digest | cut -c 1-64
"""
STOP_FOLLOWING = ': > "$1.end"; rm -f "$1"'

# Free space, then a digest of some blocks of each cached file of an asked size. Each of $@: "SIZE BLOCK BLOCK ...".
STOCK = f"""\
{_DIGEST}{_SIZE}printf '%s\\n' "$(df -Pk "$root" | tail -n 1)"
[ $# -eq 0 ] || for file in "$root"/cache/*; do
  there=$(size "$file" 2>/dev/null) || continue
  for asked in "$@"; do
    case $asked in "$there "*)
      for at in ${{asked#* }}; do dd if="$file" bs={BLOCK_BYTES} skip="$at" count=1; done 2>/dev/null |
        digest | cut -c 1-64 ;;
    esac
  done
done
"""

RECEIVE = 'umask 077; cat > "$1" || { rm -f "$1"; exit 1; }'

# Give cached files their names in the run folder: hard links, copies where the system permits none.
PLACE = """\
cd "$run" || exit 1
while [ $# -gt 0 ]; do
  case $2 in */*) mkdir -p "./${2%/*}" || exit 1 ;; esac
  rm -f "./$2"
  ln "$1" "./$2" 2>/dev/null || cp "$1" "./$2" || exit 1
  shift 2
done
"""

# The same after $1, which has just arrived, was moved into the cache as $2, whose names follow.
KEEP = f'chmod 444 "$1" && mv -f "$1" "$2" || exit 1; shift\n{PLACE}'

RECEIVE_SMALL = """\
cd "$run" || exit 1
case $1 in */*) mkdir -p "./${1%/*}" || exit 1 ;; esac
rm -f "./$1"
cat > "./$1"
"""

PULL = 'cd "$run" && [ -e "./$1" ] || { echo "there is no $1" >&2; exit 66; }; tar cf - "./$1"'

INFO = """\
said() { printf '%s\\t%s\\n' "$1" "$2"; }
said machine "$(uname -m)"
said bits "$(getconf LONG_BIT 2>/dev/null)"
said kernel "$(uname -sr)"
said cores "$(getconf _NPROCESSORS_ONLN 2>/dev/null || nproc 2>/dev/null)"
said os "$(. /etc/os-release 2>/dev/null && printf %s "$PRETTY_NAME")"
said memory_total "$(grep MemTotal: /proc/meminfo 2>/dev/null || sysctl -n hw.memsize 2>/dev/null)"
said memory_free "$(grep MemAvailable: /proc/meminfo 2>/dev/null)"
grep -E '^(model name|Hardware|Model)[[:space:]]*:' /proc/cpuinfo 2>/dev/null | sort -u | while IFS= read -r line
do said cpu "${line#*:}"; done
if command -v getprop >/dev/null 2>&1; then
  said cpu "$(getprop ro.soc.manufacturer) $(getprop ro.soc.model)"
  said os "Android $(getprop ro.build.version.release), $(getprop ro.product.manufacturer) $(getprop ro.product.model)"
fi
said disk "$(df -Pk "$root" | tail -n 1)"
"""


class Script:
    """One script with its marks and variables, ready to be sent."""

    def __init__(
        self,
        body: str,
        word: str,
        variables: Mapping[str, str],
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._begin, self._end = f"qat-edge-begin-{word}", f"qat-edge-end-{word}"
        settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        settings += [f"export {name}={shlex.quote(value)}" for name, value in (env or {}).items()]
        # The body ends by itself or by `finish CODE`, which an explicit `exit` must not follow with another code.
        self._text = "\n".join(
            [
                *settings,
                f"set -- {shlex.join(arguments)}",
                f'finish() {{ [ -n "$told" ] || printf \'\\n%s %s\\n\' {self._end} "$1" >&2; told=yes; }}',
                "trap 'finish \"$?\"' EXIT",
                f"echo {self._begin}; echo {self._begin} >&2",
                body,
            ]
        )

    def line(self) -> bytes:
        """What stdin begins with."""
        encoded = (chr(b) if chr(b).isascii() and chr(b).isalnum() else f"\\{b:03o}" for b in self._text.encode())
        return "".join(encoded).encode() + b"\n"

    def skip_noise(self, stdout: IO[bytes]) -> bool:
        """Read up to the first mark; whether it came."""
        return any(line.rstrip(b"\r\n").endswith(self._begin.encode()) for line in stdout)

    def after_noise(self, on_line: Callable[[str], None]) -> Callable[[str], None]:
        """`on_line` for the lines after the first mark."""
        begun = False

        def watch(line: str) -> None:
            nonlocal begun
            if begun:
                on_line(line)
            begun = begun or line.endswith(self._begin)

        return watch

    def completed(self, completed: Completed) -> Completed | None:
        """The script's own exit code and output, None where its end did not come through."""
        _, _, stderr = completed.stderr.rpartition(self._begin + "\n")
        found = re.search(rf"\n{self._end} (\d+)\n", stderr)
        if found is None:
            return None
        _, _, stdout = completed.stdout.rpartition(self._begin + "\n")
        return Completed(int(found[1]), stdout, stderr[: found.start()])

    def has_ended(self, stderr: str) -> bool:
        """Whether the last mark came through."""
        return f"\n{self._end} " in stderr

    def without_marks(self, text: str) -> str:
        """`text` for people."""
        return re.sub(rf"\n?[^\n]*({self._begin}|{self._end} \d+)[^\n]*", "", text)
