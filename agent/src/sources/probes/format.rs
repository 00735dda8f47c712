//! Where tracepoint fields lie on this kernel, from tracefs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Tracefs, where kernels mount it.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// A setting of the programs that holds the offset of a field.
pub(super) struct FieldOffset {
    /// The setting.
    pub(super) setting: &'static str,
    category: &'static str,
    event: &'static str,
    field: &'static str,
    /// Whether kernels exist that lack the field; the setting is 0 there.
    optional: bool,
}

const fn field(
    setting: &'static str,
    category: &'static str,
    event: &'static str,
    field: &'static str,
) -> FieldOffset {
    FieldOffset {
        setting,
        category,
        event,
        field,
        optional: false,
    }
}

/// Every offset the programs need.
pub(super) const OFFSETS: &[FieldOffset] = &[
    field("SWITCH_PREV_STATE", "sched", "sched_switch", "prev_state"),
    field("SWITCH_NEXT_PID", "sched", "sched_switch", "next_pid"),
    field("WAKEUP_PID", "sched", "sched_wakeup", "pid"),
    field("NEWTASK_PID", "task", "task_newtask", "pid"),
    field("NEWTASK_FLAGS", "task", "task_newtask", "clone_flags"),
    FieldOffset {
        setting: "EXIT_GROUP_DEAD",
        category: "sched",
        event: "sched_process_exit",
        field: "group_dead",
        optional: true,
    },
    field("ISSUE_DEV", "block", "block_rq_issue", "dev"),
    field("ISSUE_SECTOR", "block", "block_rq_issue", "sector"),
    field("ISSUE_BYTES", "block", "block_rq_issue", "bytes"),
    field("COMPLETE_DEV", "block", "block_rq_complete", "dev"),
    field("COMPLETE_SECTOR", "block", "block_rq_complete", "sector"),
    field("SYSCALL_ARGS", "syscalls", "sys_enter_mmap", "addr"),
    field("SYSCALL_RET", "syscalls", "sys_exit_mmap", "ret"),
];

impl FieldOffset {
    /// The tracepoint, as `category/event`.
    pub(super) fn tracepoint(&self) -> String {
        format!("{}/{}", self.category, self.event)
    }

    /// Reads the offset; the text says what is missing.
    pub(super) fn read(&self, tracefs: &Path) -> Result<u32, String> {
        let path = tracefs
            .join("events")
            .join(self.category)
            .join(self.event)
            .join("format");
        let text = fs::read_to_string(&path)
            .map_err(|error| format!("this kernel has no tracepoint {} ({error})", self.tracepoint()))?;
        match offset_of(&text, self.field) {
            Some(offset) => Ok(offset),
            None if self.optional => Ok(0),
            None => Err(format!(
                "tracepoint {} has no field {}",
                self.tracepoint(),
                self.field
            )),
        }
    }
}

/// The offset of a field in the text of a `format` file.
pub(super) fn offset_of(text: &str, field: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let (declaration, rest) = line.trim().strip_prefix("field:")?.split_once(';')?;
        let name = declaration
            .split(['[', ' ', '\t', '*'])
            .rfind(|word| !word.is_empty() && !word.ends_with(']'))?;
        if name != field {
            return None;
        }
        let offset = rest
            .split(';')
            .find_map(|part| part.trim().strip_prefix("offset:"))?;
        offset.trim().parse().ok()
    })
}

/// Finds tracefs, and mounts it where it belongs when it is nowhere.
///
/// # Errors
/// It is not mounted and cannot be.
pub(super) fn tracefs() -> io::Result<PathBuf> {
    let mounted = || {
        PLACES
            .iter()
            .map(Path::new)
            .find(|place| place.join("events").is_dir())
    };
    if let Some(place) = mounted() {
        return Ok(place.to_owned());
    }
    rustix::mount::mount(
        "tracefs",
        PLACES[0],
        "tracefs",
        rustix::mount::MountFlags::empty(),
        None,
    )?;
    mounted()
        .map(Path::to_owned)
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SWITCH: &str = "name: sched_switch\nID: 372\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n\
        \tfield:char prev_comm[16];\toffset:8;\tsize:16;\tsigned:0;\n\
        \tfield:pid_t prev_pid;\toffset:24;\tsize:4;\tsigned:1;\n\
        \tfield:long prev_state;\toffset:32;\tsize:8;\tsigned:1;\n\
        \tfield:const char * filename;\toffset:40;\tsize:8;\tsigned:0;\n\n\
        print fmt: \"prev_comm=%s\", REC->prev_comm\n";

    #[test]
    fn fields_are_found_by_name_whatever_their_type() {
        assert_eq!(offset_of(SWITCH, "common_type"), Some(0));
        assert_eq!(offset_of(SWITCH, "prev_comm"), Some(8));
        assert_eq!(offset_of(SWITCH, "prev_state"), Some(32));
        assert_eq!(offset_of(SWITCH, "filename"), Some(40));
        assert_eq!(offset_of(SWITCH, "next_pid"), None);
        assert_eq!(offset_of("field:pid_t", "pid_t"), None);
        // As a kernel of version 6.1 has it.
        let aer = "\tfield:__data_loc char[] dev_name;\toffset:8;\tsize:4;\tsigned:0;\n\
            \tfield:u32 status;\toffset:12;\tsize:4;\tsigned:0;\n\
            \tfield:u8 severity;\toffset:16;\tsize:1;\tsigned:0;\n\
            \tfield:u32 tlp_header[4];\toffset:20;\tsize:16;\tsigned:0;\n";
        let found = ["dev_name", "status", "severity", "tlp_header"].map(|field| offset_of(aer, field));
        assert_eq!(found, [Some(8), Some(12), Some(16), Some(20)]);
    }
}
