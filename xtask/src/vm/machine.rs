//! One virtual machine: a QEMU that dies with this process, its folder, its monitor.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use stallscope_vm::{PORT, SHARED_TAG};

use super::guest::Guest;
use super::initramfs;
use crate::lab::interrupt;
use crate::lab::process::{Child, inside};
use crate::setup::Kernel;

/// The emulator.
const QEMU: &str = "qemu-system-x86_64";

/// Memory of a machine, MiB.
const MEMORY_MIB: u32 = 1536;

/// How long a machine may take from nothing to its first word: 12 s when emulated on an idle host.
const BOOT: Duration = Duration::from_secs(150);

/// How long a machine that runs on the processor itself may take to its first program: about one second.
const PROBE: Duration = Duration::from_secs(6);

/// How long the monitor may take to answer.
const MONITOR: Duration = Duration::from_secs(20);

/// PCI identity of the card that carries RDMA, in the emulator.
pub(super) const CARD: &str = "card";

/// PCI identity of the slot that holds a display device, which to the bus is a GPU.
pub(super) const GPU_SLOT: &str = "gpu_slot";

/// What the kernel is told. On a busy host an emulated timer comes late, and a kernel that checks it gives up: it must not
/// check. The processors' counters are those of the host, which agree with each other: without its own check the kernel takes
/// them as its clock, instead of a device whose every reading costs microseconds.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable";

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor.
    Kvm,
    /// The emulator.
    Emulation,
}

impl Accelerator {
    /// The processor, when a trivial guest runs on it within seconds: on hosts that are themselves virtual, `/dev/kvm` may
    /// be there and a stock kernel hang.
    pub(super) fn find(kernel: &Kernel, initial: &Path, folder: &Path) -> Result<Self> {
        let usable = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if !usable {
            return Ok(Self::Emulation);
        }
        let log = folder.join("probe.log");
        let mut command = basic(Self::Kvm, kernel, initial, "", &log);
        let mut child = Child::start(
            "the probe of KVM",
            &mut command,
            &folder.join("probe.qemu.log"),
            false,
        )?;
        let deadline = Instant::now() + PROBE;
        let mut found = Self::Emulation;
        while Instant::now() < deadline && child.ended()?.is_none() {
            interrupt::check()?;
            std::thread::sleep(Duration::from_millis(50));
        }
        if fs::read(&log).is_ok_and(|text| String::from_utf8_lossy(&text).contains(initramfs::ALIVE)) {
            found = Self::Kvm;
        }
        child.kill();
        Ok(found)
    }

    fn argument(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Emulation => "tcg,thread=multi",
        }
    }

    /// In words.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::Emulation => "emulation",
        }
    }
}

/// The part of the command line that every machine has.
fn basic(accelerator: Accelerator, kernel: &Kernel, initial: &Path, words: &str, log: &Path) -> Command {
    let mut command = inside(None, Path::new(QEMU));
    command
        .args([
            "-M",
            "q35",
            "-accel",
            accelerator.argument(),
            "-cpu",
            "max",
            "-smp",
            "2",
        ])
        .args(["-m", &MEMORY_MIB.to_string()])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-kernel"])
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initial)
        .arg("-append")
        .arg(format!("{KERNEL_WORDS} {words}"))
        .arg("-serial")
        .arg(format!("file:{}", log.display()));
    command
}

/// A place at one end of the two links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The first machine.
    Left,
    /// The second.
    Right,
}

impl End {
    /// Name of the machine, in messages and as its host name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
        }
    }

    /// The other end.
    pub(super) fn other(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
        }
    }

    /// Last part of its addresses.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Left => 1,
            Self::Right => 2,
        }
    }
}

/// What a machine boots.
#[derive(Debug)]
pub(super) struct Boot<'a> {
    /// What runs it.
    pub(super) accelerator: Accelerator,
    /// Its kernel.
    pub(super) kernel: &'a Kernel,
    /// Its initial file system.
    pub(super) initial: &'a Path,
    /// The program that serves requests, a path of the host.
    pub(super) program: &'a Path,
    /// A short path of the host for sockets and logs of both machines.
    pub(super) folder: &'a Path,
}

/// A running machine.
#[derive(Debug)]
pub(super) struct Machine {
    /// Its end of the links.
    pub(super) end: End,
    /// What it does for us.
    pub(super) guest: Guest,
    qemu: Child,
    console: PathBuf,
    monitor: PathBuf,
    shared: PathBuf,
}

impl Machine {
    /// Starts the emulator; the machine is not up yet.
    pub(super) fn start(end: End, boot: &Boot<'_>) -> Result<Self> {
        let at = |what: &str| boot.folder.join(format!("{}.{what}", end.name()));
        let shared = at("shared");
        fs::create_dir(&shared).with_context(|| format!("failed to create {}", shared.display()))?;
        let console = at("console");
        let words = format!("guest={} hostname={}", boot.program.display(), end.name());
        let mut command = basic(boot.accelerator, boot.kernel, boot.initial, &words, &console);
        add_folders(&mut command, &shared);
        add_control(&mut command, &at("requests"), &at("monitor"));
        add_links(&mut command, end, boot.folder);
        let mut qemu = Child::start(
            &format!("machine {}", end.name()),
            &mut command,
            &at("qemu.log"),
            false,
        )?;
        let stream = connect(&at("requests"), &mut qemu)?;
        Ok(Self {
            end,
            guest: Guest::new(end.name(), stream)?,
            qemu,
            console,
            monitor: at("monitor"),
            shared,
        })
    }

    /// Waits until the machine is up, and hands back its kernel's release.
    pub(super) fn up(&mut self) -> Result<String> {
        let deadline = Instant::now() + BOOT;
        loop {
            interrupt::check()?;
            if let Some(hello) = self.guest.hello(Duration::from_millis(200)) {
                return Ok(hello.kernel);
            }
            if let Err(error) = self.qemu.check_running() {
                bail!("{error:#}\n{}", self.console_tail());
            }
            if Instant::now() >= deadline {
                bail!(
                    "machine {} is not up after {BOOT:?}: {}",
                    self.end.name(),
                    self.console_tail()
                );
            }
        }
    }

    /// The folder that the machine sees as [`stallscope_vm::SHARED_FOLDER`].
    pub(super) fn shared(&self) -> &Path {
        &self.shared
    }

    /// The last lines that its kernel said.
    pub(super) fn console_tail(&self) -> String {
        let text = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        format!(
            "its console ends:\n{}",
            lines[lines.len().saturating_sub(15)..].join("\n")
        )
    }

    /// Gives the emulator's monitor a command for people, and hands back its answer.
    pub(super) fn monitor(&self, line: &str) -> Result<String> {
        let stream = UnixStream::connect(&self.monitor).context("the emulator's monitor is gone")?;
        stream.set_read_timeout(Some(MONITOR))?;
        let mut writer = stream.try_clone()?;
        let mut lines = BufReader::new(stream).lines();
        let mut ask = |request: Option<Value>| -> Result<Value> {
            if let Some(request) = request {
                writeln!(writer, "{request}")?;
            }
            loop {
                let line = lines.next().context("the emulator's monitor said nothing")??;
                let answer: Value =
                    serde_json::from_str(&line).context("the monitor's answer is not JSON")?;
                if answer.get("event").is_none() {
                    return Ok(answer);
                }
            }
        };
        ask(None)?;
        ask(Some(json!({"execute": "qmp_capabilities"})))?;
        let answer = ask(Some(
            json!({"execute": "human-monitor-command", "arguments": {"command-line": line}}),
        ))?;
        answer["return"]
            .as_str()
            .map(|text| text.trim().to_owned())
            .with_context(|| format!("the monitor refused {line:?}: {answer}"))
    }
}

/// The host's whole tree, read-only, and a folder that both write.
fn add_folders(command: &mut Command, shared: &Path) {
    let folders = [
        ("host", Path::new("/"), ",readonly=on,multidevs=remap"),
        (SHARED_TAG, shared, ""),
    ];
    for (tag, path, options) in folders {
        command
            .arg("-fsdev")
            .arg(format!(
                "local,id={tag},path={},security_model=none{options}",
                path.display()
            ))
            .args(["-device", &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}")]);
    }
}

fn add_control(command: &mut Command, requests: &Path, monitor: &Path) {
    command
        .args(["-device", "virtio-serial-pci", "-chardev"])
        .arg(format!(
            "socket,id=requests,path={},server=on,wait=off",
            requests.display()
        ))
        .args(["-device", &format!("virtserialport,chardev=requests,name={PORT}")])
        .arg("-chardev")
        .arg(format!(
            "socket,id=monitor,path={},server=on,wait=off",
            monitor.display()
        ))
        .args(["-mon", "chardev=monitor,mode=control"]);
}

/// Two cables to the other machine: one for RDMA, on a card behind a port that could carry more than the card uses, and one
/// for everything else, so that what is done to the first disturbs no conversation. Beside them a display in a slot of its own.
fn add_links(command: &mut Command, end: End, folder: &Path) {
    for cable in ["data", "talk"] {
        let socket = |end: End| {
            folder
                .join(format!("{}.{cable}", end.name()))
                .display()
                .to_string()
        };
        command.arg("-netdev").arg(format!(
            "dgram,id={cable},local.type=unix,local.path={},remote.type=unix,remote.path={}",
            socket(end),
            socket(end.other())
        ));
    }
    let number = end.number();
    command
        .args([
            "-device",
            "pcie-root-port,id=above,slot=1,x-speed=16,x-width=16",
            "-device",
        ])
        .arg(format!(
            "virtio-net-pci,id={CARD},netdev=data,bus=above,aer=on,mac={}",
            mac(Cable::Data, number)
        ))
        .arg("-device")
        .arg(format!(
            "virtio-net-pci,netdev=talk,mac={}",
            mac(Cable::Talk, number)
        ))
        .arg("-device")
        .arg(format!(
            "pcie-root-port,id={GPU_SLOT},slot=2,x-speed=16,x-width=16"
        ))
        .args(["-device", &format!("bochs-display,bus={GPU_SLOT}")]);
}

/// The cables between the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cable {
    /// Carries RDMA.
    Data,
    /// Carries the rest.
    Talk,
}

/// Address of a machine's end of a cable.
pub(super) fn mac(cable: Cable, number: u8) -> String {
    let kind = match cable {
        Cable::Data => 1,
        Cable::Talk => 2,
    };
    format!("52:54:00:00:{kind:02x}:{number:02x}")
}

/// Connects to a socket that the emulator is about to make.
fn connect(path: &Path, qemu: &mut Child) -> Result<UnixStream> {
    let deadline = Instant::now() + MONITOR;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("the emulator never made {}", path.display()));
            }
            Err(_) => {
                qemu.check_running()?;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
