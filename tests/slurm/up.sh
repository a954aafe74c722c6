#!/usr/bin/env bash
# Brings up a Slurm of five virtual nodes on this machine, an sshd on loopback and a SkyPilot home that knows both.
#
#     sudo KDSLURM_VENV=.venv bash tests/slurm/up.sh
#
# Debian 12 and root; no systemd, no cgroups, no cloud. May be run again at any time: what runs is left alone.
# Only three things lie outside $KDSLURM_ROOT: Debian packages, the account kdslurm, and marked lines in /etc/hosts.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "$(id -u)" = 0 ] || { echo "tests/slurm/up.sh needs root: it starts slurmd and adds an account" >&2; exit 1; }
R=$KDSLURM_ROOT
BEGAN=$(date +%s%3N)
T=$BEGAN
lap() { local now; now=$(date +%s%3N); printf '  %-24s %5.1f s\n' "$1" "$(((now - T) / 100))e-1"; T=$now; }
umask 022

# --- packages
missing=()
need() { [ -x "$(command -v "$1" || echo "/usr/sbin/$1")" ] || missing+=("$2"); } # PROGRAM PACKAGE
need munged munge
need slurmctld slurmctld
need slurmd slurmd
need squeue slurm-client
need sshd openssh-server
need ssh openssh-client
need rsync rsync
need nc netcat-openbsd
need socat socat
need setpriv util-linux
need patchelf patchelf
need python3 python3
if [ ${#missing[@]} -gt 0 ]; then
    policy=/usr/sbin/policy-rc.d # so that no package starts a daemon of its own
    [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' > $policy && chmod 755 $policy && trap 'rm -f /usr/sbin/policy-rc.d' EXIT; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install -y --no-install-recommends "${missing[@]}" slurm-wlm-basic-plugins >/dev/null
fi
lap "packages"

# --- the account: its home is what login node and nodes share
mkdir -p "$R"/{etc,run,log,spool,node-tools,shared}
if ! getent passwd $ACCOUNT >/dev/null; then
    useradd --no-create-home --home-dir "$R/home" --shell /bin/bash $ACCOUNT
    for folder in home shared client tmp src sky-runtime; do # of an account before, which may have had another number
        [ ! -e "$R/$folder" ] || chown -R $ACCOUNT:$ACCOUNT "$R/$folder"
    done
fi
usermod --home "$R/home" --password '*' $ACCOUNT # '*': no password; '!' would lock the account for sshd as well
install -d -o $ACCOUNT -g $ACCOUNT -m 755 "$R/home" "$R/shared" "$R/client" "$R/client/.sky" "$R/client/.slurm"
install -d -o $ACCOUNT -g $ACCOUNT -m 700 "$R/home/.ssh"

# --- environments that the account can read, wherever the checkout lies
clone() { # VENV NAME: hard links where they can be made
    local from base program to=$R/$2 stamp
    from=$(realpath "$1")
    stamp="$from $(find "$from"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' -printf '%f %T@\n' | sort | sha256sum)"
    [ "$(cat "$to.stamp" 2>/dev/null)" = "$stamp" ] && return
    rm -rf "$to" "$to.base"
    link_or_copy "$from" "$to"
    base=$("$from/bin/python" -c 'import sys; print(sys.base_prefix)')
    if ! as_account "$base/bin/python3" -c '' 2>/dev/null; then # such as a Python below /root
        link_or_copy "$base" "$to.base"
        program=$(realpath "$to.base/bin/python3")
        cp -p "$program" "$program.own" && mv "$program.own" "$program"
        patchelf --set-rpath '$ORIGIN/../lib' "$program" # it would look for its library where it was built
        rm "$to"/bin/python* "$to/pyvenv.cfg"
        ln -s "$to.base/bin/python3" "$to/bin/python3" && ln -s python3 "$to/bin/python"
        sed "s|^home = .*|home = $to.base/bin|" "$from/pyvenv.cfg" > "$to/pyvenv.cfg"
    fi
    as_account "$to/bin/python" -c ''
    echo "$stamp" > "$to.stamp"
}
link_or_copy() { cp -al "$1" "$2" 2>/dev/null || { rm -rf "$2" && cp -a "$1" "$2"; }; }
clone "$KDSLURM_VENV" client-env
if [ "$(realpath "$KDSLURM_NODE_VENV")" = "$(realpath "$KDSLURM_VENV")" ]; then
    rm -rf "$R/node-env" "$R/node-env.stamp" && ln -s client-env "$R/node-env"
else
    [ ! -L "$R/node-env" ] || rm "$R/node-env"
    clone "$KDSLURM_NODE_VENV" node-env
fi
SKY=$("$R/client-env/bin/python" -c 'from importlib.metadata import version; print(version("skypilot"))')
[ -x "$R/node-tools/bin/uv" ] || "$R/client-env/bin/python" -m pip install --quiet --disable-pip-version-check \
    --root-user-action=ignore --upgrade --target "$R/node-tools" uv
# SkyPilot's own runtime for a node, made once: no launch needs the network after this.
if [ ! -e "$R/sky-runtime/.made-for-$SKY" ]; then
    rm -rf "$R/sky-runtime"
    export UV_CACHE_DIR=$R/uv-cache UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy
    uv=$R/node-tools/bin/uv
    $uv venv --quiet --seed --relocatable --python /usr/bin/python3 "$R/sky-runtime"
    VIRTUAL_ENV=$R/sky-runtime $uv pip install --quiet "skypilot[slurm,remote]==$SKY"
    # Compiled once, not by every process of every launch. Of SkyPilot itself, which each launch brings, only that stays.
    packages=$(echo "$R"/sky-runtime/lib/python3*/site-packages)
    "$R/sky-runtime/bin/python" -m compileall -q -j 2 -x '/tests?/' "$packages" >/dev/null || true
    "$R/sky-runtime/bin/python" -m compileall -q -f -j 2 --invalidation-mode unchecked-hash "$packages/sky" >/dev/null || true
    rm -f "$packages"/sky/__pycache__/__init__.*
    cp -a "$packages/sky" "$R/sky-compiled"
    VIRTUAL_ENV=$R/sky-runtime $uv pip uninstall --quiet skypilot
    find "$R/sky-compiled" -type f ! -name '*.pyc' -delete
    rm -rf "$packages/sky" && mv "$R/sky-compiled" "$packages/sky"
    rm -rf "$R/uv-cache"
    touch "$R/sky-runtime/.made-for-$SKY"
    chown -R $ACCOUNT:$ACCOUNT "$R/sky-runtime" # who may then make hard links to it
fi
chmod -R a+rX "$R/node-tools"
lap "environments"

# --- munge, with key and socket of its own
[ -s "$R/etc/munge.key" ] || { (umask 077 && head -c 128 /dev/urandom > "$R/etc/munge.key"); }
chown munge:munge "$R/etc/munge.key" && chmod 400 "$R/etc/munge.key"
install -d -o munge -g munge -m 755 "$R/run/munge" "$R/log/munge"
is_alive "$R/run/munge/munged.pid" || setpriv --reuid munge --regid munge --clear-groups /usr/sbin/munged --force \
    --num-threads=2 --key-file="$R/etc/munge.key" --socket="$R/run/munge/socket" --pid-file="$R/run/munge/munged.pid" \
    --log-file="$R/log/munge/munged.log" --seed-file="$R/run/munge/munged.seed"

# --- Slurm: one GPU type a node; SkyPilot reads only the first of a node
for i in "${!NODES[@]}"; do
    grep -q " ${NODES[i]} # kdcloud-slurm\$" /etc/hosts || printf '127.0.0.%d %s # kdcloud-slurm\n' $((51 + i)) "${NODES[i]}" >> /etc/hosts
done
# A device file is asked for by name only and never opened: these exist everywhere.
: > "$R/etc/gres.conf"
gpus() { # NODE TYPE COUNT
    local files=(/dev/null /dev/zero /dev/full /dev/random)
    for file in "${files[@]:0:$3}"; do echo "NodeName=$1 Name=gpu Type=$2 File=$file" >> "$R/etc/gres.conf"; done
}
gpus rtx-0 rtx3090 4
gpus rtx-1 rtx3090 4
gpus a10g-0 a10g 4
gpus a100-0 a100 4
gpus l4-0 l4 1
size="CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=262144 State=UNKNOWN"
cat > "$R/etc/slurm.conf" <<EOF
ClusterName=lab
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$R/run/munge/socket
SlurmctldPort=26817
SlurmctldPidFile=$R/run/slurmctld.pid
SlurmdPidFile=$R/run/slurmd.%n.pid
SlurmctldLogFile=$R/log/slurmctld.log
SlurmdLogFile=$R/log/slurmd.%n.log
StateSaveLocation=$R/spool/slurmctld
SlurmdSpoolDir=$R/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog=$R/etc/task-prolog
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
InactiveLimit=0
KillWait=5
OverTimeLimit=0
MinJobAge=30
GresTypes=gpu
NodeName=rtx-0  NodeHostname=rtx-0  NodeAddr=127.0.0.51 Port=26821 Gres=gpu:rtx3090:4 $size
NodeName=rtx-1  NodeHostname=rtx-1  NodeAddr=127.0.0.52 Port=26822 Gres=gpu:rtx3090:4 $size
NodeName=a10g-0 NodeHostname=a10g-0 NodeAddr=127.0.0.53 Port=26823 Gres=gpu:a10g:4    $size
NodeName=a100-0 NodeHostname=a100-0 NodeAddr=127.0.0.54 Port=26824 Gres=gpu:a100:4    $size
NodeName=l4-0   NodeHostname=l4-0   NodeAddr=127.0.0.55 Port=26825 Gres=gpu:l4:1      $size
PartitionName=main Nodes=$(IFS=,; echo "${NODES[*]}") Default=YES MaxTime=7-00:00:00 State=UP
EOF
# Runs as the account before every task of a job. In the batch step it lays out what a node of a real cluster would
# already have, or fetch: uv and SkyPilot's runtime (each cluster has a home of its own), and Python with torch.
cat > "$R/etc/task-prolog" <<EOF
#!/bin/bash
printf 'export %s\n' UV_OFFLINE=1 UV_PYTHON_DOWNLOADS=never
case "\${SLURM_STEP_ID:-4294967291}" in 4294967291 | -5) ;; *) exit 0 ;; esac
name=\$SLURM_JOB_NAME
[ -f "$R/home/.sky_provision/\$name.sh" ] || exit 0
home=$R/home/.sky_clusters/\$name runtime=/tmp/\$name
mkdir -p "\$home/.local/bin" "\$home/.kdcloud" "\$runtime/.sky"
ln -sfn $R/node-tools/bin/uv "\$home/.local/bin/uv"
ln -sfn $R/node-env "\$home/.kdcloud/env"
# With no pid file SkyPilot would end every skylet of this account on the host: here all nodes are one host.
[ -e "\$runtime/.sky/skylet_pid" ] || echo 999999999 > "\$runtime/.sky/skylet_pid"
[ -d "\$runtime/skypilot-runtime" ] || cp -al $R/sky-runtime "\$runtime/skypilot-runtime" 2>/dev/null ||
    cp -a $R/sky-runtime "\$runtime/skypilot-runtime"
exit 0
EOF
chmod 755 "$R/etc/task-prolog"
export SLURM_CONF=$R/etc/slurm.conf
mkdir -p "$R/spool/slurmctld"
is_alive "$R/run/slurmctld.pid" || /usr/sbin/slurmctld -i -f "$SLURM_CONF"
for node in "${NODES[@]}"; do # a host name of its own, so that SkyPilot finds the node's address from within
    mkdir -p "$R/spool/$node"
    is_alive "$R/run/slurmd.$node.pid" ||
        unshare --uts sh -c 'hostname "$1" && exec /usr/sbin/slurmd -N "$1" -f "$2"' - "$node" "$SLURM_CONF"
done
for _ in $(seq 100); do
    bad=$(sinfo -h -N -o '%N %t' 2>/dev/null | grep -vE ' (idle|mix|alloc|comp)$' | cut -d' ' -f1 | sort -u | paste -sd, || true)
    [ -n "$bad" ] || sinfo -h >/dev/null 2>&1 && [ -z "$bad" ] && break
    [ -z "$bad" ] || scontrol update "nodename=$bad" state=resume 2>/dev/null || true
    sleep 0.2
done
[ -z "$bad" ] || { sinfo -N -R; echo "nodes that do not come up: $bad; see $R/log" >&2; exit 1; }
lap "slurm"

# --- the login node: sshd on loopback
key() { [ -s "$1" ] || ssh-keygen -q -t ed25519 -N '' -C kdcloud-slurm -f "$1"; }
key "$R/etc/host-key"
key "$R/client/id"
chown $ACCOUNT:$ACCOUNT "$R/client/id" "$R/client/id.pub"
touch "$R/home/.ssh/authorized_keys"
grep -qFf "$R/client/id.pub" "$R/home/.ssh/authorized_keys" || cat "$R/client/id.pub" >> "$R/home/.ssh/authorized_keys"
chown $ACCOUNT:$ACCOUNT "$R/home/.ssh/authorized_keys" && chmod 600 "$R/home/.ssh/authorized_keys"
cat > "$R/etc/sshd_config" <<EOF
Port $KDSLURM_SSH_PORT
ListenAddress 127.0.0.1
HostKey $R/etc/host-key
PidFile $R/run/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
AllowUsers $ACCOUNT
MaxSessions 200
MaxStartups 150:30:200
Subsystem sftp /usr/lib/openssh/sftp-server
SetEnv SLURM_CONF=$SLURM_CONF
EOF
mkdir -p /run/sshd
is_alive "$R/run/sshd.pid" || /usr/sbin/sshd -f "$R/etc/sshd_config" -E "$R/log/sshd.log"

# --- the client: a home in which SkyPilot knows this cluster under two names, with prices of their own
: > "$R/client/.slurm/config"
for alias in lab hall; do
    cat >> "$R/client/.slurm/config" <<EOF
Host $alias
    HostName 127.0.0.1
    Port $KDSLURM_SSH_PORT
    User $ACCOUNT
    IdentityFile $R/client/id
    IdentitiesOnly yes
EOF
done
cat > "$R/client/.sky/config.yaml" <<EOF
allowed_clouds: [slurm]
slurm:
  allowed_clusters: [lab, hall]
  provision_timeout: 20
  pricing:
    accelerators: {L4: 0.2, RTX3090: 0.25, A10G: 1.0, A100: 3.5}
  cluster_configs:
    hall:
      pricing:
        accelerators: {L4: 0.4, RTX3090: 0.5, A10G: 1.5, A100: 4.5}
EOF
# Names and memory of accelerators; absent, SkyPilot would fetch the tables.
mkdir -p "$R/client/.sky/catalogs/v8/common"
cat > "$R/client/.sky/catalogs/v8/common/accelerators.csv" <<'EOF'
AcceleratorName,Clouds
L4,"['AWS', 'Slurm']"
RTX3090,"['RunPod', 'Slurm']"
A10G,"['AWS', 'Slurm']"
A100,"['AWS', 'Slurm']"
H100,"['Lambda', 'RunPod']"
EOF
cat > "$R/client/.sky/catalogs/v8/common/metadata.csv" <<'EOF'
GPU,MemoryGB,Manufacturer
L4,24,nvidia
RTX3090,24,nvidia
A10G,24,nvidia
A100,40,nvidia
H100,80,nvidia
EOF
chown -R $ACCOUNT:$ACCOUNT "$R/client/.sky" "$R/client/.slurm"
cat > "$R/env.sh" <<EOF
# What a client of the test cluster needs to see. KDSLURM_UP says that up.sh has been here.
export HOME=$R/client
export KDSLURM_UP=$R
export SKYPILOT_API_SERVER_LOCAL_PORT=$KDSLURM_API_PORT
export SKYPILOT_DISABLE_USAGE_COLLECTION=1
export SLURM_CONF=$SLURM_CONF
EOF
for _ in $(seq 50); do
    as_account ssh -F "$R/client/.slurm/config" -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o LogLevel=ERROR lab sinfo -h >/dev/null 2>&1 && break
    sleep 0.1
done
lap "login node"
as_account SLURM_CONF="$SLURM_CONF" sinfo -N -o '%N %t %G'
printf 'up after %.1f s\n' "$(($(date +%s%3N) - BEGAN))e-3"
