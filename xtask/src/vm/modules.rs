//! Which modules a module needs, from the index that `depmod` writes.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::setup::Kernel;

/// The index of a kernel's modules.
#[derive(Debug)]
struct Index {
    /// File of a module by its name, with underscores.
    files: HashMap<String, String>,
    /// What a file needs, nearest first.
    needs: HashMap<String, Vec<String>>,
}

/// The files of the named modules and of all they need, in an order in which they load.
pub(super) fn in_load_order(kernel: &Kernel, names: &[&str]) -> Result<Vec<PathBuf>> {
    let folder = kernel.modules();
    let path = folder.join("modules.dep");
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let index = Index::parse(&text);
    let files = index.in_load_order(names)?;
    Ok(files.into_iter().map(|file| folder.join(file)).collect())
}

impl Index {
    fn parse(text: &str) -> Self {
        let mut index = Self {
            files: HashMap::new(),
            needs: HashMap::new(),
        };
        for (file, needs) in text.lines().filter_map(|line| line.split_once(':')) {
            index.files.insert(name(file), file.to_owned());
            index.needs.insert(
                file.to_owned(),
                needs.split_whitespace().map(str::to_owned).collect(),
            );
        }
        index
    }

    fn in_load_order(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        for wanted in names {
            let file = self
                .files
                .get(&wanted.replace('-', "_"))
                .with_context(|| format!("the kernel has no module {wanted}"))?;
            // The index names everything that a module needs, what is deepest last.
            let needs = self.needs.get(file).into_iter().flatten().rev();
            for file in needs.chain([file]) {
                if !order.contains(file) {
                    order.push(file.clone());
                }
            }
        }
        Ok(order)
    }
}

/// The name of a module by its file; dashes and underscores are the same in names.
fn name(file: &str) -> String {
    let file = file.rsplit('/').next().unwrap_or(file);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let index = Index::parse(
            "k/fs/9p/9p.ko: k/net/9p/9pnet.ko k/fs/netfs.ko\nk/net/9p/9pnet.ko:\nk/fs/netfs.ko:\n\
             k/drivers/virtio-net.ko.xz: k/fs/netfs.ko\n",
        );
        assert_eq!(
            index.in_load_order(&["9p", "virtio_net"]).unwrap(),
            [
                "k/fs/netfs.ko",
                "k/net/9p/9pnet.ko",
                "k/fs/9p/9p.ko",
                "k/drivers/virtio-net.ko.xz"
            ]
        );
        let error = index.in_load_order(&["nosuch"]).unwrap_err();
        assert!(error.to_string().contains("nosuch"));
    }
}
