//! Users and groups, read from `/etc/passwd` and `/etc/group`.
//!
//! The C library's look-ups would load the guest's own name service modules into this static
//! binary, so the two files are read here. They are read anew for every request: a program inside
//! may have added a user a moment ago, and they are small.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Longest account file that is read, in bytes; the files are the guest's and may be anything.
const FILE_MAX_BYTES: u64 = 4 * 1024 * 1024;

/// One line of the user file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, the primary one included.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: PathBuf,
}

/// Both files, parsed.
#[derive(Debug, Clone, Default)]
pub struct Accounts {
    users: Vec<UserLine>,
    groups: Vec<GroupLine>,
    user_names: BTreeMap<u32, String>,
    group_names: BTreeMap<u32, String>,
}

#[derive(Debug, Clone)]
struct UserLine {
    name: String,
    uid: u32,
    gid: u32,
    home: PathBuf,
}

#[derive(Debug, Clone)]
struct GroupLine {
    gid: u32,
    members: Vec<String>,
}

impl Accounts {
    /// Reads the machine's account files. A missing or unreadable file counts as empty, and the
    /// user `root` always exists: a bare image has no files at all.
    pub fn load() -> Accounts {
        let users = read_bounded(Path::new("/etc/passwd"));
        let groups = read_bounded(Path::new("/etc/group"));
        Accounts::parse(&users, &groups)
    }

    /// Parses the text of both files. Lines that do not parse are left out.
    pub fn parse(users: &str, groups: &str) -> Accounts {
        let mut accounts = Accounts::default();
        for user in users.lines().filter_map(parse_user) {
            accounts.user_names.entry(user.uid).or_insert_with(|| user.name.clone());
            accounts.users.push(user);
        }
        if !accounts.users.iter().any(|user| user.name == "root") {
            accounts.user_names.entry(0).or_insert_with(|| "root".to_owned());
            let home = PathBuf::from("/root");
            accounts.users.push(UserLine { name: "root".to_owned(), uid: 0, gid: 0, home });
        }
        for line in groups.lines() {
            if let Some((name, group)) = parse_group(line) {
                accounts.group_names.entry(group.gid).or_insert_with(|| name.to_owned());
                accounts.groups.push(group);
            }
        }
        accounts.group_names.entry(0).or_insert_with(|| "root".to_owned());
        accounts
    }

    /// The user of that name.
    pub fn user(&self, name: &str) -> Option<User> {
        self.users.iter().find(|user| user.name == name).map(|user| self.complete(user))
    }

    /// The first user with that id.
    pub fn user_by_id(&self, uid: u32) -> Option<User> {
        self.users.iter().find(|user| user.uid == uid).map(|user| self.complete(user))
    }

    /// The name of a user id; the number itself when nobody has it.
    pub fn user_name(&self, uid: u32) -> String {
        self.user_names.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// The name of a group id; the number itself when no group has it.
    pub fn group_name(&self, gid: u32) -> String {
        self.group_names.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }

    fn complete(&self, user: &UserLine) -> User {
        let mut groups = vec![user.gid];
        for group in &self.groups {
            if group.gid != user.gid && group.members.contains(&user.name) {
                groups.push(group.gid);
            }
        }
        let UserLine { name, uid, gid, home } = user.clone();
        User { name, uid, gid, groups, home }
    }
}

fn parse_user(line: &str) -> Option<UserLine> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let _password = fields.next()?;
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let _comment = fields.next()?;
    let home = fields.next().filter(|home| !home.is_empty()).unwrap_or("/");
    Some(UserLine { name: name.to_owned(), uid, gid, home: PathBuf::from(home) })
}

fn parse_group(line: &str) -> Option<(&str, GroupLine)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let _password = fields.next()?;
    let gid = fields.next()?.parse().ok()?;
    let members = fields.next().unwrap_or_default();
    let members =
        members.split(',').filter(|member| !member.is_empty()).map(str::to_owned).collect();
    Some((name, GroupLine { gid, members }))
}

fn read_bounded(path: &Path) -> String {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let Ok(file) = std::fs::File::open(path) else { return String::new() };
    match file.take(FILE_MAX_BYTES).read_to_end(&mut bytes) {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/bash\n\
        # a comment\n\
        broken line\n\
        nohome:x:7:7::\n\
        user:x:1000:1000:,,,:/home/user:/bin/bash\n\
        twin:x:1000:1000::/home/twin:/bin/sh\n";
    const GROUPS: &str = "root:x:0:\nuser:x:1000:\nsudo:x:27:other,user\ndocker:x:998:users\n";

    #[test]
    fn a_user_has_home_and_groups() {
        let accounts = Accounts::parse(USERS, GROUPS);
        let user = accounts.user("user").expect("listed");
        assert_eq!((user.uid, user.gid), (1000, 1000));
        assert_eq!(user.groups, vec![1000, 27]);
        assert_eq!(user.home, PathBuf::from("/home/user"));
        assert_eq!(accounts.user_by_id(1000).expect("listed").name, "user");
        assert!(accounts.user("nobody").is_none());
        assert!(accounts.user("broken line").is_none());
        assert_eq!(accounts.user("nohome").expect("listed").home, PathBuf::from("/"));
    }

    #[test]
    fn ids_without_a_name_stay_numbers() {
        let accounts = Accounts::parse(USERS, GROUPS);
        assert_eq!(accounts.user_name(1000), "user");
        assert_eq!(accounts.user_name(4242), "4242");
        assert_eq!(accounts.group_name(27), "sudo");
        assert_eq!(accounts.group_name(4242), "4242");
    }

    #[test]
    fn root_exists_without_files() {
        let accounts = Accounts::parse("", "");
        assert_eq!(accounts.user("root").expect("built in").uid, 0);
        assert_eq!(accounts.user_name(0), "root");
        assert_eq!(accounts.group_name(0), "root");
    }

    /// The two files, with a bar between them.
    #[test]
    fn any_account_files_give_root_and_find_whom_they_list() {
        crate::fuzz::run("accounts", &["root:x:", ":0:", "\n", "|", "user"], |input| {
            let text = String::from_utf8_lossy(input);
            let (users, groups) = text.split_once('|').unwrap_or((&text, ""));
            let accounts = Accounts::parse(users, groups);
            assert!(accounts.user("root").is_some());
            for line in &accounts.users {
                assert!(!line.name.is_empty() && !line.name.contains([':', '\n']));
                let user = accounts.user(&line.name).expect("listed");
                assert_eq!(user.groups.first(), Some(&user.gid));
            }
            crate::fuzz::outcome((accounts.users.len(), accounts.groups.len()))
        });
    }
}
