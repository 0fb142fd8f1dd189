#!/usr/bin/env bash
# The first ten minutes on a machine with a GPU: what tells most comes first, and nothing that ran is lost.
#
#   benchmarks/first_light.sh [--out DIR] [--wheels DIR] [--budget SECONDS] [--only PART,...] [--limit SECONDS]
#                             [--simulated]
#
#   --out DIR         five small files: summary.txt, summary.json, look.json, gpu_suite.json, log.txt
#                     (default: build/first-light)
#   --wheels DIR      install these wheels first, offline, into a folder of this run's own; the kernels of a wheel of
#                     dreammix-trt among them are taken instead of being built
#   --budget SECONDS  in all (default: 600). A part that no longer fits is left out, and the summary says so
#   --only PART,...   some of: wheels, look, and the parts of gpu_suite.py ("compiled" and "peers" stand for several)
#   --limit SECONDS   no part may take longer (each has a limit of its own)
#   --simulated       a dry run without a GPU: miniature networks on the simulated device
#
# PYTHON names the interpreter (default: python3); torch with CUDA has to be installed there. The network is never used.
# The summary is written before and after every part. Exits 0 where all parts passed, 1 where one failed or was stopped,
# 3 where none failed but some were skipped or did not fit, 2 for a wrong call.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}
out=$root/build/first-light wheels='' budget=600 only='' most='' simulated=false
grace=10 # seconds from asking a part to end to killing it

# name, seconds it may take, seconds without which it is not worth starting; in the order in which they run
parts='
wheels          120   5
look             90   5
machine         120  20
build           420  40
kernels         150  30
memcheck        180  30
loop            180  40
graphs          150  40
networks        180  40
subjects        180  40
full            360  90
compiled-step   400 100
compiled-vae    400 100
compiled-guided 600 150
compiled-quick  600 150
peers-eager     360  90
peers-float32   240  60
peers-guided    600 150
peers-quick     600 150
memory          180  40
soak            400  60
rtx             120  20
ratios           60   5
'

refuse() { echo "first_light.sh: $1" >&2; exit 2; }
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
is_number() { case $1 in '' | *[!0-9]* | 0*) return 1 ;; esac; }

while [ $# -gt 0 ]; do
    case $1 in
        --out | --wheels | --budget | --only | --limit) [ $# -ge 2 ] || refuse "$1 wants a value (--help)" ;;
    esac
    case $1 in
        --out) out=$2; shift ;;
        --wheels) wheels=$2; shift ;;
        --budget) budget=$2; shift ;;
        --only) only=$2; shift ;;
        --limit) most=$2; shift ;;
        --simulated) simulated=true ;;
        -h | --help) usage; exit 0 ;;
        *) refuse "unknown option $1 (--help)" ;;
    esac
    shift
done
is_number "$budget" || refuse "--budget is '$budget'; it is a number of seconds, from 1"
[ -z "$most" ] || is_number "$most" || refuse "--limit is '$most'; it is a number of seconds, from 1"
[ -z "$wheels" ] || ls "$wheels"/*.whl >/dev/null 2>&1 || refuse "--wheels: $wheels holds no wheel (*.whl)"
known=" $(echo "$parts" | awk 'NF { print $1 }' | tr '\n' ' ')"
for name in ${only//,/ }; do
    case "$known compiled peers " in *" $name "*) ;; *) refuse "--only: no part $name; there are$known" ;; esac
done
command -v timeout >/dev/null || refuse "the program timeout (coreutils) is needed"
command -v "$python" >/dev/null || refuse "there is no $python; PYTHON names the interpreter"
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)
work=$root/build/first-light-work # kept: kernels and what torch compiled, for a second call
log=$out/log.txt
began=$(date +%s) started=$(date -u +%Y-%m-%dT%H:%M:%SZ)
names=() states=() codes=() seconds=() limits=() reasons=()
child=''
: >"$log"

# ------------------------------------------------------------------------------------------------ the summary

# a text for JSON, in `quoted`
quote() {
    quoted=${1//[[:cntrl:]]/ }
    quoted=${quoted//\\/\\\\}
    quoted=${quoted//\"/\\\"}
}

write_summary() {
    local i comma='' spent=$(($(date +%s) - began))
    {
        printf '{\n  "name": "first_light",\n  "started": "%s",\n  "simulated": %s,\n' "$started" "$simulated"
        printf '  "budget": %d,\n  "seconds": %d,\n  "parts": [' "$budget" "$spent"
        for i in "${!names[@]}"; do
            quote "${reasons[i]}"
            printf '%s\n    {"part": "%s", "state": "%s", "rc": %s, "seconds": %s, "limit": %s, "reason": "%s"}' \
                "$comma" "${names[i]}" "${states[i]}" "${codes[i]}" "${seconds[i]}" "${limits[i]}" "$quoted"
            comma=,
        done
        printf '\n  ]\n}\n'
    } >"$out/.summary.json" && mv "$out/.summary.json" "$out/summary.json"
    {
        $simulated && echo "SIMULATED: no figure here is a GPU's"
        for i in "${!names[@]}"; do
            printf '%-16s %-11s rc %-4s %5s s of %4s  %s\n' "${names[i]}" "${states[i]}" "${codes[i]}" "${seconds[i]}" \
                "${limits[i]}" "${reasons[i]}"
        done
        echo "$spent s of $budget"
    } >"$out/.summary.txt" && mv "$out/.summary.txt" "$out/summary.txt"
}

# note STATE RC SECONDS REASON: of the part that was added last
note() {
    local i=$((${#names[@]} - 1))
    states[i]=$1 codes[i]=$2 seconds[i]=$3 reasons[i]=$4
    write_summary
    [ "$1" = running ] || printf '%-16s %s (rc %s, %s s) %s\n' "${names[i]}" "$1" "$2" "$3" "$4"
}

interrupted() {
    [ -z "$child" ] || { kill -TERM "$child" 2>/dev/null; wait "$child"; }
    [ ${#names[@]} -eq 0 ] || note interrupted 143 "$(($(date +%s) - ${since:-$began}))" "this script was told to end"
    exit 143
}
trap interrupted TERM INT HUP

# ------------------------------------------------------------------------------------------------ the parts

# the command of a part, in `words`
choose_command() {
    local name=$1 limit=$2
    case $name in
        look) words=("$python" "$here/_gpu_look.py" --out "$out/look.json") ;;
        wheels) words=(bash -c "$install" install "$python" "$wheels" "$work/site") ;;
        *)
            words=("$python" "$here/gpu_suite.py" "$name" --out "$out/gpu_suite.json" --build "$work/build")
            words+=(--limit "$limit")
            [ -z "$kernels" ] || words+=(--kernels "$kernels")
            ! $simulated || words+=(--simulate --eager --width 0.1 --side 64 --steps 2 --repeats 1 --requests 3 --swaps 4)
            ;;
    esac
}

# Without their dependencies: what the machine has (torch) stays. Each into a folder of its own, as packages of one name
# ("cuda") would replace one another; one that does not fit does not keep the others out.
install='
python=$1 wheels=$2 site=$3 wrong=0
for wheel in "$wheels"/*.whl; do
    case $wheel in */dreammix_trt-*) continue ;; esac
    "$python" -m pip install --no-index --find-links "$wheels" --no-deps --no-compile --quiet --upgrade \
        --disable-pip-version-check --target "$site/$(basename "$wheel" .whl)" "$wheel" ||
        { echo "FAILED: $(basename "$wheel") is not installed"; wrong=1; }
done
exit $wrong'

# the last thing a part said that tells how it ended; $1: where in the log it began
last_words() {
    local said
    said=$(tail -c +"$(($1 + 1))" "$log" | LC_ALL=C tr -cd '\n\t\40-\176' | grep -v '^ *$')
    { grep -E '^ *(FAILED|SKIPPED|MISSING):|MISSED' <<<"$said" || echo "$said"; } | tail -n 1 | sed 's/^ *//' | cut -c 1-300
}

run_part() {
    local name=$1 limit=$2 least=$3 left code from state
    left=$((budget - ($(date +%s) - began) - grace))
    [ -z "$most" ] || [ "$limit" -le "$most" ] || limit=$most
    [ "$least" -le "$limit" ] || least=$limit
    names+=("$name") limits+=("$limit") states+=('') codes+=(null) seconds+=(0) reasons+=('')
    if [ "$left" -lt "$least" ]; then
        note "not started" null 0 "$((left > 0 ? left : 0)) s are left of the budget, it wants $least"
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    limits[${#limits[@]} - 1]=$limit
    printf '\n=== %s\n' "$name" >>"$log"
    from=$(wc -c <"$log") since=$(date +%s)
    note running null 0 ''
    choose_command "$name" "$((limit > 60 ? limit - 20 : limit))" # gpu_suite.py stops a part itself, its rows kept
    timeout -k "$grace" "$limit" "${words[@]}" >>"$log" 2>&1 &
    child=$!
    wait "$child"
    code=$? child=''
    case $code in 0) state=passed ;; 3) state=skipped ;; 124 | 137) state=stopped ;; *) state=failed ;; esac
    case $state in
        passed) note passed 0 "$(($(date +%s) - since))" "$(tail -c +"$((from + 1))" "$log" | grep -aE '^MISSING:')" ;;
        stopped) note stopped $code "$(($(date +%s) - since))" "stopped at its limit (or killed); log.txt has what it said" ;;
        *) note "$state" $code "$(($(date +%s) - since))" "$(last_words "$from")" ;;
    esac
}

is_wanted() {
    [ -n "$only" ] || return 0
    case ",$only," in *",$1,"* | *",${1%%-*},"*) return 0 ;; esac
    case $1,",$only," in ratios,*,peers,*) return 0 ;; esac
    return 1
}

! $simulated || export OMP_NUM_THREADS=1 # on so little work several threads only wait for one another
kernels=''
if [ -n "$wheels" ]; then
    for wheel in "$wheels"/*.whl; do
        case $wheel in
            */dreammix_trt-*) kernels=$wheel ;;
            *)
                site=$work/site/$(basename "$wheel" .whl)
                export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH"
                ;;
        esac
    done
fi
while read -r name limit least; do
    [ -n "$name" ] && is_wanted "$name" || continue
    [ "$name" != wheels ] || [ -n "$wheels" ] || continue
    run_part "$name" "$limit" "$least"
done <<<"$parts"

write_summary
cat "$out/summary.txt"
case " ${states[*]} " in
    *" failed "* | *" stopped "*) exit 1 ;;
    *" skipped "* | *" not started "*) exit 3 ;;
esac
