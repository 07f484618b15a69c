# Set-up shared by scripts/demo, scripts/test and scripts/bench, which source this file and call
#
#   umm_setup NAME run|test
#
# Then $UMM_ROOT is the tree and $UMM_BIN the bin directory of its virtual environment, in which the package is
# installed editable and its C core is built. The first run makes it; later ones see by a stamp that nothing
# changed. What cannot be had here is named on stderr with the command to type, and the script exits 3.

UMM_ROOT=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
UMM_BIN=$UMM_ROOT/.venv/bin

umm_say() {
	printf '%s: %s\n' "$UMM_NAME" "$*" >&2
}

umm_cannot() {
	umm_say "$@"
	exit 3
}

# umm_lack WHAT PACKAGE...: something is missing that these Debian packages bring (none: apt has no remedy).
umm_lack() {
	umm_lacks+=("$1")
	umm_packages+=("${@:2}")
}

umm_compiles() { # COMMAND HEADER
	# No pipe: with pipefail, a compiler that ends without reading would count as one that lacks the header.
	$1 -E -x c -o /dev/null - <<<"#include <$2>" 2>/dev/null
}

# What the interpreter lacks, one per line: WHAT PACKAGE (Debian keeps venv and the headers in packages of their
# own); and its tag, which names the build directory.
umm_python_lacks() {
	"$1" -I - <<-'PYTHON'
	import os, sys
	if sys.version_info < (3, 11):
	    print("old %d.%d" % sys.version_info[:2])
	    raise SystemExit
	import importlib.util, sysconfig
	name = "python%d.%d-" % sys.version_info[:2] if sys.base_prefix == "/usr" else ""
	if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
	    print("venv", name and name + "venv")
	if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
	    print("headers", name and name + "dev")
	print("tag cp%d%d" % sys.version_info[:2])
	PYTHON
}

umm_check_python() {
	local python=$1 what package
	umm_tag=
	if ! command -v "$python" >/dev/null; then
		[ -z "${PYTHON:-}" ] || umm_cannot "PYTHON=$PYTHON: there is no such interpreter"
		umm_lack "Python 3.11 or newer (no $python on PATH)" python3 python3-venv python3-dev
		return
	fi
	while read -r what package; do
		case $what in
		tag) umm_tag=$package ;;
		old) umm_cannot "$python is Python $package, too old: install Python 3.11 or newer and type" \
			"PYTHON=/path/to/python3.11 $UMM_NAME" ;;
		venv) umm_lack "the venv module of $python" $package ;;
		headers) umm_lack "the C headers of $python (Python.h)" $package ;;
		esac
	done < <(umm_python_lacks "$python" 2>/dev/null || true)
	[ -n "$umm_tag" ] || umm_cannot "$python does not run as a Python 3 interpreter; name another:" \
		"PYTHON=/path/to/python3 $UMM_NAME"
}

# Fills umm_lacks and umm_packages. PURPOSE PYTHON
umm_check_machine() {
	umm_lacks=() umm_packages=()
	umm_check_python "$2"
	local cc=${CC:-cc}
	if ! command -v "${cc%% *}" >/dev/null; then
		[ -z "${CC:-}" ] || umm_cannot "CC=$CC: there is no such compiler"
		umm_lack "a C compiler (no cc on PATH)" gcc libc6-dev
		cc=cpp
	else
		umm_compiles "$cc" stdlib.h || umm_lack "the C library's headers" libc6-dev
	fi
	umm_compiles "$cc" xxhash.h || umm_lack "xxhash.h" libxxhash-dev
	umm_compiles "$cc" urcu/urcu-bp.h || umm_lack "liburcu (urcu/urcu-bp.h)" liburcu-dev
	# With it meson finds liburcu.
	command -v "${PKG_CONFIG:-pkg-config}" >/dev/null || umm_lack "pkg-config" pkgconf
}

umm_apt() {
	local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=300)
	umm_say "installing Debian packages: $*"
	"${apt[@]}" install --no-install-recommends "$@" >>"$umm_log" 2>&1 </dev/null && return
	# A new machine has no package lists yet, or old ones.
	"${apt[@]}" update >>"$umm_log" 2>&1 </dev/null &&
		"${apt[@]}" install --no-install-recommends "$@" >>"$umm_log" 2>&1 </dev/null
}

umm_require_machine() { # PURPOSE PYTHON
	umm_check_machine "$@"
	[ ${#umm_lacks[@]} -gt 0 ] || return 0
	if [ ${#umm_packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		umm_apt "${umm_packages[@]}" || umm_say "apt-get failed, the end of $umm_log:
$(tail -n 5 "$umm_log")"
		hash -r
		umm_check_machine "$@"
		[ ${#umm_lacks[@]} -gt 0 ] || return 0
	fi
	local lack
	for lack in "${umm_lacks[@]}"; do
		umm_say "missing: $lack"
	done
	if [ ${#umm_packages[@]} -gt 0 ]; then
		umm_cannot "on Debian and its kin, type: sudo apt-get install ${umm_packages[*]}"
	fi
	umm_cannot "install what is missing, or name another interpreter: PYTHON=/path/to/python3 $UMM_NAME"
}

# Runs a command with its output in the log; when it fails, the end of the log is shown and the script
# exits with STATUS. STATUS WHAT COMMAND...
umm_logged() {
	local status=$1 what=$2
	shift 2
	"$@" >>"$umm_log" 2>&1 </dev/null && return
	tail -n 30 "$umm_log" >&2
	umm_say "$what failed; all of its output: $umm_log"
	exit "$status"
}

# What only some stages and tests use, in lines FILE-OR-COMMAND PACKAGE: those are skipped, with this reason, where
# it cannot be had. The cross compiler serves the aarch64 build, the kernels and the ELF tests, spin the model of the
# notifiers, the rest the guests and the images.
umm_test_tools() {
	cat <<-'TOOLS'
	aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu
	/usr/aarch64-linux-gnu/include/stdlib.h libc6-dev-arm64-cross
	qemu-system-aarch64 qemu-system-arm
	make make
	flex flex
	bison bison
	bc bc
	readelf binutils
	depmod kmod
	mksquashfs squashfs-tools
	zstd zstd
	xz xz-utils
	/usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring
	buildah buildah
	debootstrap debootstrap
	spin spin
	TOOLS
}

umm_test_packages() { # fills `packages` with those whose file or command is missing
	local what package
	packages=()
	while read -r what package; do
		case $what in
		/*) [ -e "$what" ] ;;
		*) PATH=$PATH:/usr/sbin:/sbin command -v "$what" >/dev/null ;;
		esac || packages+=("$package")
	done < <(umm_test_tools)
}

umm_try_test_tools() {
	local packages package
	umm_test_packages
	[ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
	umm_apt "${packages[@]}" && return
	# One that this release does not have must not keep the others away.
	for package in "${packages[@]}"; do
		DEBIAN_FRONTEND=noninteractive apt-get -y install --no-install-recommends "$package" \
			>>"$umm_log" 2>&1 </dev/null || true
	done
	umm_test_packages
	[ ${#packages[@]} = 0 ] || umm_say "could not be installed, so what needs them is skipped: ${packages[*]}"
}

# Identifies what the environment was made from: another interpreter, place or list of packages makes a new one.
umm_digest() { # PYTHON
	{
		"$1" -I -c 'import sys; print(sys.version, sys.base_prefix)'
		printf '%s\n' "$UMM_ROOT"
		cat "$UMM_ROOT"/pyproject.toml "$UMM_ROOT"/meson.{build,options} "$UMM_ROOT"/native/meson.{build,options} \
			"$UMM_ROOT"/scripts/lib/setup.sh
	} | sha256sum | cut -d ' ' -f 1
}

umm_make_environment() { # PURPOSE PYTHON
	local extras=plot venv=$UMM_ROOT/.venv
	[ "$1" = test ] && extras=plot,dev
	if [ -n "$have" ]; then
		umm_say "the build files or the interpreter changed: bringing .venv up to date"
	else
		umm_say "first run here: setting up .venv and building (about a minute)"
	fi
	# An environment that this script began and did not finish may be half of anything; one that somebody else
	# made is used as it is.
	if [ -e "$venv/.umm-made-here" ] && [ ! -e "$venv/.umm-ready" ] || ! "$UMM_BIN/python" -m pip --version \
		>/dev/null 2>&1 || [ "$(umm_version "$UMM_BIN/python")" != "$(umm_version "$2")" ]; then
		rm -rf "$venv" "$UMM_ROOT/build/$umm_tag"
		umm_logged 3 "making the virtual environment" "$2" -m venv "$venv"
		: >"$venv/.umm-made-here"
	fi
	rm -f "$venv/.umm-ready"
	local requires
	mapfile -t requires < <("$UMM_BIN/python" -I -c '
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["build-system"]["requires"], sep="\n")' "$UMM_ROOT/pyproject.toml")
	# An editable package is rebuilt when it is imported, so its build tools live in the environment.
	umm_logged 3 "pip install (does this machine reach a package index?)" \
		"$UMM_BIN/python" -m pip install --disable-pip-version-check "${requires[@]}" ninja
	export PATH="$UMM_BIN:$PATH"
	umm_logged 3 "pip install (does this machine reach a package index?)" \
		"$UMM_BIN/python" -m pip install --disable-pip-version-check --no-build-isolation \
		--config-settings=builddir="build/$umm_tag" --editable "$UMM_ROOT[$extras]"
	printf '%s %s\n' "$umm_want" "$1" >"$venv/.umm-ready"
}

umm_version() { # PYTHON
	"$1" -I -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null
}

umm_setup() { # NAME PURPOSE
	UMM_NAME=$1
	local purpose=$2 tool python umm_log umm_tag umm_want have=
	for tool in env id dirname mkdir cat cut tail sha256sum flock; do
		command -v "$tool" >/dev/null || umm_cannot "missing: $tool; on Debian and its kin, type:" \
			"sudo apt-get install coreutils util-linux"
	done
	# With this variable the editable package cannot be imported at all.
	unset MESONPY_EDITABLE_SKIP PYTHONHOME
	umm_log=$UMM_ROOT/build/setup.log
	mkdir -p "$UMM_ROOT/build" || umm_cannot "cannot write to $UMM_ROOT"
	exec 9>"$UMM_ROOT/build/.setup.lock"
	if ! flock -n 9; then
		umm_say "waiting for another set-up of this tree"
		flock 9
	fi
	: >"$umm_log"
	python=${PYTHON:-python3}
	[ -z "${PYTHON:-}" ] && [ -e "$UMM_ROOT/.venv/.umm-ready" ] && "$UMM_BIN/python" -I -c '' 2>/dev/null &&
		python=$UMM_BIN/python
	umm_require_machine "$purpose" "$python"
	umm_want=$(umm_digest "$python")
	[ -e "$UMM_ROOT/.venv/.umm-ready" ] && have=$(cat "$UMM_ROOT/.venv/.umm-ready")
	if [ "$have" != "$umm_want test" ] && [ "$have" != "$umm_want $purpose" ]; then
		[ "$purpose" != test ] || umm_try_test_tools
		umm_make_environment "$purpose" "$python"
	fi
	export PATH="$UMM_BIN:$PATH"
	umm_logged 1 "building the C core" "$UMM_BIN/ninja" -C "$UMM_ROOT/build/$umm_tag"
	exec 9>&-
}
