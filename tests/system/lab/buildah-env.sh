# Sourced after lib.sh: buildah on a host with no container runtime set up. Its storage is its own, below $LAB; RUN steps run
# in a chroot, so on the host's network.
export STORAGE_DRIVER=${STORAGE_DRIVER:-overlay} BUILDAH_ISOLATION=chroot
export CONTAINERS_STORAGE_CONF=$LAB/storage-$STORAGE_DRIVER.conf
cat >"$CONTAINERS_STORAGE_CONF" <<CONF
[storage]
driver = "$STORAGE_DRIVER"
graphroot = "$LAB/storage-$STORAGE_DRIVER"
runroot = "$LAB/storage-$STORAGE_DRIVER-run"
CONF
