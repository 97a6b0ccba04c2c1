//! A file system on a device as slow as a test wants: every write waits for the device.
//!
//! ```text
//!   ext4, mounted with `sync` ─► loop device ─► a file shown through FUSE ─► QEMU's storage daemon, throttled ─► image
//! ```

use super::device::Loop;
use super::*;

/// Gone when dropped.
pub struct SlowFiles {
    /// Where it is mounted.
    pub mount: PathBuf,
    monitor: Qmp,
    daemon: Child,
    device: Option<Loop>,
    _home: tempfile::TempDir,
}

impl SlowFiles {
    /// An empty one of so many MiB, not slow yet.
    pub fn new(mib: u64) -> SlowFiles {
        let home = tempfile::Builder::new().prefix("livebackup-slow-").tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        std::fs::File::create(at("image")).unwrap().set_len(mib << 20).unwrap();
        std::fs::write(at("shown"), b"").unwrap();
        std::fs::create_dir(at("mount")).unwrap();
        let dir = home.path().display();
        let mut command = Command::new(Version::V10.program("qemu-storage-daemon"));
        command.args(["--chardev", &format!("socket,id=qmp,path={dir}/qmp,server=on,wait=off")]);
        command.args(["--monitor", "chardev=qmp", "--object", "throttle-group,id=slow"]);
        command.args(["--blockdev", &format!("driver=file,node-name=image,filename={dir}/image,discard=unmap")]);
        command.args(["--blockdev", "driver=throttle,node-name=throttled,throttle-group=slow,file=image"]);
        command
            .args(["--export", &format!("type=fuse,id=shown,node-name=throttled,mountpoint={dir}/shown,writable=on")]);
        let daemon = command.stdin(Stdio::null()).spawn().unwrap();
        // The image is seen through it: empty before.
        wait_until("the storage daemon to show its image (it needs /dev/fuse)", || {
            std::fs::metadata(at("shown")).is_ok_and(|about| about.len() == mib << 20)
        });
        let monitor = Qmp::connect(&at("qmp"));
        let device = Loop::new(&at("shown"));
        run(Command::new("mkfs.ext4").args(["-q", "-F", &device.device]));
        run(Command::new("mount").args(["-o", "sync", &device.device]).arg(at("mount")));
        SlowFiles { mount: at("mount"), monitor, daemon, device: Some(device), _home: home }
    }

    /// Lets the device do so many writes in a second; 0: as many as it can.
    pub fn throttle(&mut self, writes: u32) {
        let limits = json!({"iops-write": writes});
        self.monitor.call("qom-set", json!({"path": "/objects/slow", "property": "limits", "value": limits}));
    }
}

impl Drop for SlowFiles {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.mount).status();
        drop(self.device.take());
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        // A daemon that was killed leaves its mount behind.
        let _ = Command::new("umount").args(["--lazy", "--quiet"]).arg(self.mount.with_file_name("shown")).status();
    }
}
