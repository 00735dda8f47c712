//! Control groups: whether a process is in scope, and the job its path names.

/// The paths of one process, from `/proc/PID/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct CgroupPaths {
    lines: Vec<Line>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    /// `cpu,cpuacct`; empty for version 2.
    controllers: String,
    path: String,
}

/// `hierarchy:controllers:path` lines, cgroups(7). Others are skipped.
pub(super) fn parse_cgroups(text: &str) -> CgroupPaths {
    let line = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let _hierarchy: u32 = fields.next()?.parse().ok()?;
        let controllers = fields.next()?.to_owned();
        let path = fields.next().filter(|path| path.starts_with('/'))?.to_owned();
        Some(Line { controllers, path })
    };
    CgroupPaths {
        lines: text.lines().filter_map(line).collect(),
    }
}

impl CgroupPaths {
    /// Whether any hierarchy's path is `scope` or below it.
    pub(super) fn within(&self, scope: &str) -> bool {
        let scope = scope.trim_end_matches('/');
        self.lines.iter().any(|line| {
            line.path
                .strip_prefix(scope)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    /// Version 1's path of a controller.
    pub(super) fn v1(&self, controller: &str) -> Option<&str> {
        let has = |line: &&Line| line.controllers.split(',').any(|name| name == controller);
        self.lines.iter().find(has).map(|line| line.path.as_str())
    }

    /// Version 2's path.
    pub(super) fn v2(&self) -> Option<&str> {
        self.lines
            .iter()
            .find(|line| line.controllers.is_empty())
            .map(|line| line.path.as_str())
    }

    /// The path that carries the CPU limits: version 1's cpu controller where it is in use, else version 2's.
    pub(super) fn cpu(&self) -> &str {
        self.v1("cpu").or_else(|| self.v2()).unwrap_or("/")
    }

    /// Slurm's `job_<id>`: the same on all nodes of a job.
    pub(super) fn slurm_job(&self) -> Option<String> {
        self.find(slurm_job)
    }

    /// Kubernetes' pod, else a container: names a job within one node.
    pub(super) fn container(&self) -> Option<String> {
        self.find(pod).or_else(|| self.find(container))
    }

    fn find(&self, name: fn(&str) -> Option<String>) -> Option<String> {
        self.lines
            .iter()
            .find_map(|line| line.path.split('/').find_map(name))
    }
}

fn slurm_job(part: &str) -> Option<String> {
    let id = part.strip_prefix("job_")?;
    (!id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit())).then(|| id.to_owned())
}

/// `pod<uid>`, or under systemd `kubepods-burstable-pod<uid with underscores>.slice`.
fn pod(part: &str) -> Option<String> {
    let part = part.strip_suffix(".slice").unwrap_or(part);
    let uid = match part.strip_prefix("pod") {
        Some(uid) => uid,
        None => part.starts_with("kubepods").then(|| part.rsplit_once("-pod"))??.1,
    };
    let uid = uid.replace('_', "-");
    let hex = uid.bytes().filter(|&byte| byte != b'-').count();
    (hex == 32 && uid.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()))
        .then(|| format!("pod-{uid}"))
}

/// `<64 hex digits>`, `docker-<64 hex>.scope`, `cri-containerd-<64 hex>.scope`, `libpod-<64 hex>.scope`.
fn container(part: &str) -> Option<String> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let id = part.rsplit_once('-').map_or(part, |(_, id)| id);
    (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .then(|| format!("container-{}", &id[..12]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job_of(path: &str) -> Option<String> {
        let paths = parse_cgroups(&format!("0::{path}\n"));
        paths.slurm_job().or_else(|| paths.container())
    }

    #[test]
    fn scope_is_a_path_not_a_prefix_of_names() {
        let paths = parse_cgroups("4:cpu,cpuacct:/vnode-1/a/rank0\n3:blkio:/x\n0::/\n");
        for inside in [
            "/vnode-1",
            "/vnode-1/",
            "/vnode-1/a",
            "/vnode-1/a/rank0",
            "/x",
            "/",
        ] {
            assert!(paths.within(inside), "{inside}");
        }
        for outside in ["/vnode", "/vnode-1/a/rank", "/a", "/vnode-1/a/rank0/b"] {
            assert!(!paths.within(outside), "{outside}");
        }
        assert_eq!(paths.cpu(), "/vnode-1/a/rank0");
        assert_eq!(
            (paths.v1("cpuacct"), paths.v1("cp"), paths.v2()),
            (Some("/vnode-1/a/rank0"), None, Some("/"))
        );
    }

    #[test]
    fn jobs_by_path() {
        let uid = "0a1b2c3d-0000-1111-2222-333344445555";
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(
            job_of("/system.slice/slurmstepd.scope/job_4711/step_0/user/task_0").as_deref(),
            Some("4711")
        );
        assert_eq!(job_of("/slurm/uid_0/job_12/step_batch").as_deref(), Some("12"));
        assert_eq!(
            job_of(&format!("/kubepods/burstable/pod{uid}/{id}")),
            Some(format!("pod-{uid}"))
        );
        let slice = format!(
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice",
            uid.replace('-', "_")
        );
        assert_eq!(job_of(&slice), Some(format!("pod-{uid}")));
        assert_eq!(
            job_of(&format!("/docker/{id}")).as_deref(),
            Some("container-0123456789ab")
        );
        assert_eq!(
            job_of(&format!("/system.slice/docker-{id}.scope")).as_deref(),
            Some("container-0123456789ab")
        );
        for none in [
            "/",
            "/user.slice",
            "/job_",
            "/job_x",
            "/podium",
            "/stallscope-vnode-3/a/rank0",
        ] {
            assert_eq!(job_of(none), None, "{none}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_survived(text: String, scope: String) {
            let paths = parse_cgroups(&text);
            let _ = (paths.slurm_job(), paths.container(), paths.within(&scope), paths.cpu().len());
        }

        #[test]
        fn any_path_is_survived(path in "/[-/a-z_0-9.\u{e9}]{0,200}") {
            let _ = job_of(&path);
        }
    }
}
