# Sourced by the scripts, from the root of the checkout: makes the virtual environment that they run in.
#
#   make_environment FOLDER EXTRAS    a virtual environment with ddpatch (editable) and its extras, reused while nothing changed
#
# PYTHON names the interpreter to build it with; by default the first python3, python3.13 ... python3.10 that is recent enough.

say() { printf "%s\n" "$@" >&2; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        if is_recent "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    say "No Python >= 3.10 found. Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or set PYTHON to its path."
    return 1
}

# Checksum of everything that decides what an environment contains.
environment_key() {
    local python=$1 extras=$2
    { cat setup.py constraints.txt && "$python" -VV && echo "$extras" && pwd; } | sha256sum | cut -c 1-16
}

create_environment() {
    local python=$1 folder=$2 log=$2.log
    rm -rf -- "$folder"
    if "$python" -m venv "$folder" >"$log" 2>&1 || "$python" -m virtualenv "$folder" >>"$log" 2>&1; then
        rm -f -- "$log"
        return 0
    fi
    rm -rf -- "$folder" # what a venv without ensurepip leaves behind
    if "$python" -m pip install -qq --target "$folder-tools" virtualenv >>"$log" 2>&1 &&
        PYTHONPATH="$folder-tools" "$python" -m virtualenv "$folder" >>"$log" 2>&1; then
        rm -rf -- "$folder-tools" "$log"
        return 0
    fi
    say "Cannot make a virtual environment with $python (see $log)."
    say "Install its venv module (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON to an interpreter that has one."
    return 1
}

make_environment() {
    local folder=$1 extras=$2 python stamp start=$SECONDS
    python=$(find_python) || return 1
    stamp=$folder/installed-$(environment_key "$python" "$extras") || return 1
    if [[ -e $stamp ]] && "$folder/bin/python" -c '' 2>/dev/null; then
        say "environment: $folder is up to date"
        return 0
    fi
    if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1 || [[ $("$folder/bin/python" -VV) != "$("$python" -VV)" ]]; then
        say "environment: making $folder with $python ($("$python" -V))"
        create_environment "$python" "$folder" || return 1
    fi
    say "environment: installing ddpatch[$extras] into $folder (minutes, the first time)"
    "$folder/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$extras]" || {
        say "environment: the installation failed; pip's words stand above"
        return 1
    }
    touch -- "$stamp"
    say "environment: $folder ready in $((SECONDS - start)) s"
}
