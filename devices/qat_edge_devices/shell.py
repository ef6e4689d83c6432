"""POSIX shell scripts sent to a device: they run in dash, bash, busybox, and mksh with toybox on Android.

The command line given to ssh or adb is always the same, `BOOTSTRAP`, and every login shell reads it alike (fish and
csh quote differently from sh). It reads the script from the first line of stdin, in which every character except
letters and digits is an octal escape. Names and arguments are therefore never parsed as shell code, and the rest of
stdin is free for the bytes of a file.

A script prints a marker with a random id before and after its output. Anything a login shell prints comes before the
first marker and is dropped; output without the last marker means a lost connection, whatever the exit code of the
client.

Variables that `Session` sets for every script: $root, the folder of qat-edge on the device; $run, the work folder; and
$nonce, the salt of file hashes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from qat_edge_devices.transport import CompletedProgram

BOOTSTRAP = """exec sh -c 'IFS= read -r s && eval "$(printf "$s")"'"""
BLOCK_BYTES = 65536  # of one sampled block of a cached file
EXIT_ABSENT = 999  # the program does not exist; no program can exit with this code

# Run a program in its own session. It ends with all its children at the end of stdin (the other side closed it, or
# died), after $limit seconds, and when it exits. The file .pid.N lets HOLD_WORK_FOLDER find it if this shell is killed.
# The two background loops are killed with KILL rather than TERM: mksh, Android's shell, may keep reading or waiting
# forever if TERM arrives just before, and would keep stdout open. A `sleep` left behind ends within its 3 s.
RUN_PROGRAM = """\
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

# Create the work folder and keep it until stdin ends, then kill what still runs there and remove the folder. A process
# is killed only if its current folder is the work folder: the id in a stale .pid.N may belong to another program.
HOLD_WORK_FOLDER = """\
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

# Print the root folder: created in the first writable folder of the arguments, or of $roots if there are none.
FIND_ROOT = """\
[ $# -gt 0 ] || set -- $roots
for base in "$@"; do [ -n "$base" ] && mkdir -p "$base" && [ -w "$base" ] && break; done 2>/dev/null
[ -w "$base" ] || { echo "none of these folders is writable: $*" >&2; exit 1; }
umask 077
mkdir -p "$base/qat-edge" && cd "$base/qat-edge" || exit 1
[ -O . ] || { echo "$base/qat-edge belongs to another user" >&2; exit 1; }
pwd -P
"""

# openssl first: it uses the processor's SHA-256 instructions, which many builds of sha256sum do not.
_DIGEST = """\
if command -v openssl >/dev/null 2>&1; then digest() { openssl dgst -sha256 -r; }
elif command -v sha256sum >/dev/null 2>&1; then digest() { sha256sum; }
elif command -v shasum >/dev/null 2>&1; then digest() { shasum -a 256; }
else echo 'neither openssl nor sha256sum nor shasum is installed' >&2; exit 1; fi
"""

_SIZE = """\
size() { stat -c %s "$1" 2>/dev/null || wc -c <"$1"; }
"""

# Print the salted sha256 of each file, "-" if it does not exist. $nonce: no digest can be known beforehand.
HASH_FILES = f"""\
{_DIGEST}for file in "$@"; do
  if [ -f "$file" ]; then {{ cat "$file"; printf %s "$nonce"; }} | digest | cut -c 1-64; else echo -; fi
done
"""

# Print the salted sha256 of file $1 while it is being received: read it as it grows to $2 bytes. A file $1.end, or the
# removal of $run, stops the script.
HASH_WHILE_RECEIVED = f"""\
{_DIGEST}{_SIZE}pause() {{ [ -d "$run" ] && [ ! -e "$1.end" ] && {{ sleep 0.02 2>/dev/null || sleep 1; }}; }}
while [ ! -f "$1" ]; do pause "$1" || exit 1; done
{{
  hashed=0
  while bytes=$(size "$1") && [ "$bytes" -lt "$2" ]; do
    blocks=$((bytes / 1048576 - hashed))
    if [ "$blocks" -gt 0 ]; then
      dd if="$1" bs=1048576 skip="$hashed" count="$blocks" 2>/dev/null
      hashed=$((hashed + blocks))
    else pause "$1" || exit 1; fi
  done
  dd if="$1" bs=1048576 skip="$hashed" 2>/dev/null
  printf %s "$nonce"
}} | digest | cut -c 1-64
"""
STOP_HASHING = ': > "$1.end"; rm -f "$1"'

# Print free space, then the sha256 of some blocks of each cached file that has one of the given sizes. Each argument:
# "SIZE BLOCK BLOCK ...".
LIST_CACHE = f"""\
{_DIGEST}{_SIZE}printf '%s\\n' "$(df -Pk "$root" | tail -n 1)"
[ $# -eq 0 ] || for file in "$root"/cache/*; do
  bytes=$(size "$file" 2>/dev/null) || continue
  for wanted in "$@"; do
    case $wanted in "$bytes "*)
      for block in ${{wanted#* }}; do dd if="$file" bs={BLOCK_BYTES} skip="$block" count=1; done 2>/dev/null |
        digest | cut -c 1-64 ;;
    esac
  done
done
"""

# Write stdin to $1; a partial file is removed.
RECEIVE = 'umask 077; cat > "$1" || { rm -f "$1"; exit 1; }'

# Link cached files into the work folder: pairs of arguments (cached file, name). Copy if hard links are not permitted.
LINK_FROM_CACHE = """\
cd "$run" || exit 1
while [ $# -gt 0 ]; do
  case $2 in */*) mkdir -p "./${2%/*}" || exit 1 ;; esac
  rm -f "./$2"
  ln "$1" "./$2" 2>/dev/null || cp "$1" "./$2" || exit 1
  shift 2
done
"""

# Move the received file $1 into the cache as $2, then link it under the names that follow.
ADD_TO_CACHE = f'chmod 444 "$1" && mv -f "$1" "$2" || exit 1; shift\n{LINK_FROM_CACHE}'

# Write stdin to $1 in the work folder. Unlinked first: the old name may be a link to a file of the cache.
RECEIVE_SMALL = """\
cd "$run" || exit 1
case $1 in */*) mkdir -p "./${1%/*}" || exit 1 ;; esac
rm -f "./$1"
cat > "./$1"
"""

# Print a tar archive of a file or folder of the work folder.
PULL = 'cd "$run" && [ -e "./$1" ] || { echo "there is no $1" >&2; exit 66; }; tar cf - "./$1"'

# Print the kilobytes used by a path in the work folder.
USED_KILOBYTES = 'cd "$run" && du -sk "./$1" 2>/dev/null || echo 0'

# Print "key<TAB>value" lines that describe the machine; a value it does not report stays empty.
MACHINE_INFO = """\
report() { printf '%s\\t%s\\n' "$1" "$2"; }
report machine "$(uname -m)"
report bits "$(getconf LONG_BIT 2>/dev/null)"
report kernel "$(uname -sr)"
report cores "$(getconf _NPROCESSORS_ONLN 2>/dev/null || nproc 2>/dev/null)"
report os "$(. /etc/os-release 2>/dev/null && printf %s "$PRETTY_NAME")"
if grep -q '^Features' /proc/cpuinfo 2>/dev/null
then report dot_product "$(grep -q '^Features.* asimddp' /proc/cpuinfo && echo yes || echo no)"; fi
report memory_total "$(grep MemTotal: /proc/meminfo 2>/dev/null || sysctl -n hw.memsize 2>/dev/null)"
report memory_free "$(grep MemAvailable: /proc/meminfo 2>/dev/null)"
grep -E '^(model name|Hardware|Model)[[:space:]]*:' /proc/cpuinfo 2>/dev/null | sort -u | while IFS= read -r line
do report cpu "${line#*:}"; done
if command -v getprop >/dev/null 2>&1; then
  report cpu "$(getprop ro.soc.manufacturer) $(getprop ro.soc.model)"
  model="$(getprop ro.product.manufacturer) $(getprop ro.product.model)"
  report os "Android $(getprop ro.build.version.release), $model"
fi
report disk "$(df -Pk "$root" | tail -n 1)"
"""


class Script:
    """One script with its markers, variables and arguments, ready to be sent.

    Args:
        body: shell code, one of the constants above.
        marker_id: random id of the markers, so that output cannot imitate them.
        variables: shell variables set before `body`.
        arguments: positional parameters of `body`.
        env: variables exported to the programs that `body` starts.
    """

    def __init__(
        self,
        body: str,
        marker_id: str,
        variables: Mapping[str, str],
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._begin, self._end = f"qat-edge-begin-{marker_id}", f"qat-edge-end-{marker_id}"
        settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        settings += [f"export {name}={shlex.quote(value)}" for name, value in (env or {}).items()]
        self._text = "\n".join(
            [
                *settings,
                f"set -- {shlex.join(arguments)}",
                # Prints the exit code once: an `exit` after `finish CODE` must not print another one.
                f'finish() {{ [ -n "$finished" ] || printf \'\\n%s %s\\n\' {self._end} "$1" >&2; finished=yes; }}',
                "trap 'finish \"$?\"' EXIT",
                f"echo {self._begin}; echo {self._begin} >&2",
                body,
            ]
        )

    def line(self) -> bytes:
        """Return the encoded script: the first line of stdin."""
        encoded = []
        for byte in self._text.encode():
            character = chr(byte)
            is_plain = character.isascii() and character.isalnum()
            encoded.append(character if is_plain else f"\\{byte:03o}")
        return "".join(encoded).encode() + b"\n"

    def skip_to_output(self, stdout: IO[bytes]) -> bool:
        """Read `stdout` up to and including the first marker; return whether the marker came."""
        return any(line.rstrip(b"\r\n").endswith(self._begin.encode()) for line in stdout)

    def only_output(self, on_line: Callable[[str], None]) -> Callable[[str], None]:
        """Wrap `on_line` so that it is called only for lines after the first marker."""
        begun = False

        def watch(line: str) -> None:
            nonlocal begun
            if begun:
                on_line(line)
            begun = begun or line.endswith(self._begin)

        return watch

    def extract(self, completed: CompletedProgram) -> CompletedProgram | None:
        """Return the script's own exit code and output from those of ssh or adb; None if the last marker is missing."""
        _, _, stderr = completed.stderr.rpartition(self._begin + "\n")
        found = re.search(rf"\n{self._end} (\d{{1,9}})\n", stderr)
        if found is None:
            return None
        _, _, stdout = completed.stdout.rpartition(self._begin + "\n")
        return CompletedProgram(int(found[1]), stdout, stderr[: found.start()])

    def has_ended(self, stderr: str) -> bool:
        """Return whether the last marker is in `stderr`."""
        return f"\n{self._end} " in stderr

    def without_markers(self, text: str) -> str:
        """Return `text` without the lines of the markers, for a message."""
        return re.sub(rf"\n?[^\n]*({self._begin}|{self._end} \d+)[^\n]*", "", text)
