#!/bin/busybox sh
# PID 1 of the outer machine: modules, the ports, then one program on the host's own files.
#
# After `ready` nothing of the host's files is in use yet, so that the machine can be saved there and
# every later run starts from that point. After `exit` or `fault` the host ends the machine.

/bin/busybox mkdir -p /dev /proc /sys /host /layer /root
/bin/busybox --install -s /bin
export PATH=/bin

mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys

# One module a line, what it needs before it, its parameters behind it.
while read -r module parameters; do
    # The parameters are several words or none.
    insmod "/modules/$module" $parameters || echo "the module $module does not load"
done </modules/order

# The kernel learns of its ports a moment after their driver is there.
for port in 1 2 3; do
    until [ -c "/dev/vport0p$port" ]; do usleep 10000; done
done
exec 3<>/dev/vport0p1 4>/dev/vport0p2 5>/dev/vport0p3

fault() {
    echo "fault $1" >&3
    while :; do sleep 60; done
}

read -r clock </sys/devices/system/clocksource/clocksource0/current_clocksource
# With any other clock KVM never enters its guests.
[ "$clock" = tsc ] || fault "its clock is $clock instead of tsc"
[ -c /dev/kvm ] || fault "it has no /dev/kvm"
echo ready >&3

# `run PATH`: a script of the host's that becomes the program. Nothing is read while nobody is there.
until read -r verb script <&3; do usleep 10000; done
[ "$verb" = run ] || fault "it does not know the request $verb"

mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144 host /host ||
    fault "it cannot mount the host's files"
# The script was written a moment ago by the host's clock; ours stopped when the machine was saved.
date -s "@$(stat -c %Y "/host$script")" >/dev/null || fault "it does not find $script on the host"
mount -t tmpfs -o mode=755,size=75% none /layer || fault "it cannot mount memory for what changes"
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work none /root ||
    fault "it cannot lay memory over the host's files"
mount -t proc none /root/proc || fault "it cannot mount /proc"
mount -t sysfs none /root/sys || fault "it cannot mount /sys"
mount -t devtmpfs none /root/dev || fault "it cannot mount /dev"
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts none /root/dev/pts || fault "it cannot mount /dev/pts"
mount -t tmpfs -o mode=1777 none /root/dev/shm || fault "it cannot mount /dev/shm"
mount -t tmpfs -o mode=755 none /root/run || fault "it cannot mount /run"
mount -t cgroup2 none /root/sys/fs/cgroup || fault "it cannot mount the control groups"
ip link set lo up
hostname nested

setsid chroot /root /bin/sh "$script" </dev/null >&4 2>&5 3>&- 4>&- 5>&-
echo "exit $?" >&3
while :; do sleep 60; done
