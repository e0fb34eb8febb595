//! Who may open a device node.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

/// What the permissions of a device node say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    /// The file's mode.
    pub(super) mode: u32,
    /// The group that owns it, unless that is root's or has no name.
    pub(super) group: Option<String>,
    /// Its number, but for root's: a container often has the host's groups without their names.
    pub(super) number: Option<u32>,
}

impl Node {
    /// Looks at it; a node that is not there has no permissions.
    pub(super) fn examine(path: &Path) -> Self {
        let Ok(metadata) = fs::metadata(path) else { return Self::default() };
        let groups = fs::read_to_string("/etc/group").unwrap_or_default();
        Self {
            mode: metadata.permissions().mode(),
            group: group_name(&groups, metadata.gid()).map(str::to_owned),
            number: Some(metadata.gid()).filter(|gid| *gid != 0),
        }
    }

    /// How a user gets to open it; `usual` is the group it has on most systems.
    pub(super) fn permission(&self, usual: &str) -> String {
        let open = self.mode & 0o060 == 0o060;
        match (&self.group, self.number) {
            (Some(group), _) if open => format!(
                "add the user to the group that owns it: usermod -aG {group} USER, then log in again"
            ),
            (None, Some(number)) if open => format!(
                "group {number} owns it, which has no name here: start with that group \
                 (a container: --group-add {number}; a unit: SupplementaryGroups={number})"
            ),
            _ => format!(
                "no group may open it: a udev rule with GROUP=\"{usual}\", MODE=\"0660\" gives it to \
                 one, usermod -aG {usual} USER adds the user (who logs in again)"
            ),
        }
    }
}

/// The name of a group other than root's in a file like `/etc/group`.
fn group_name(groups: &str, gid: u32) -> Option<&str> {
    groups.lines().filter(|_| gid != 0).find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_that_owns_it_is_the_one_to_join() {
        let groups = "root:x:0:\nkvm:x:104:me\nvirt:x:300:\n";
        assert_eq!(group_name(groups, 300), Some("virt"));
        assert_eq!(group_name(groups, 0), None);
        assert_eq!(group_name(groups, 7), None);
        let node = |mode, group: Option<&str>| Node {
            mode,
            group: group.map(str::to_owned),
            number: group.map(|_| 300),
        };
        let hint = node(0o20660, Some("virt")).permission("kvm");
        assert!(hint.contains("usermod -aG virt USER"), "{hint}");
        let nameless = Node { mode: 0o20660, group: None, number: Some(993) }.permission("kvm");
        assert!(nameless.contains("--group-add 993"), "{nameless}");
        for closed in [node(0o20600, Some("virt")), node(0o20660, None), Node::default()] {
            let hint = closed.permission("kvm");
            assert!(hint.contains("udev rule") && hint.contains("-aG kvm"), "{hint}");
        }
    }
}
