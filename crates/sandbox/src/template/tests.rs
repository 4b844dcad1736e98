use std::fs::{File, OpenOptions};

use super::*;

fn meta() -> TemplateMeta {
    TemplateMeta {
        template_id: TemplateId::random(),
        build_id: BuildId::random(),
        aliases: vec!["base".to_owned(), "my-team.x_1".to_owned()],
        vcpus: Vcpus(1),
        memory: MiB(512),
        disk: MiB(1),
        envd_version: "0.6.13".to_owned(),
        tier: Tier::Emulated,
        fingerprint: "qemu 10.0".to_owned(),
        created_at: UnixMillis(1_700_000_000_000),
        source_key: "abc".to_owned(),
    }
}

fn fill(dir: &Path) {
    let rootfs = File::create(dir.join(ROOTFS)).expect("create");
    rootfs.set_len(1 << 20).expect("grow");
    for name in ["memory", "state", "machine.json"] {
        std::fs::write(dir.join(name), "x").expect("write");
    }
}

fn publish(templates: &Path, meta: &TemplateMeta) -> Template {
    let draft = TemplateDraft::create(templates, &meta.build_id).expect("draft");
    fill(draft.dir());
    draft.publish(meta).expect("publish")
}

#[test]
fn a_published_template_is_read_back() {
    let dir = tempfile::tempdir().expect("temp folder");
    let (mut old, new) = (meta(), meta());
    old.created_at = UnixMillis(1);
    let first = publish(dir.path(), &old);
    let second = publish(dir.path(), &new);
    assert_eq!(second.meta, new);
    let abandoned = TemplateDraft::create(dir.path(), &BuildId::random()).expect("draft");
    fill(abandoned.dir());
    assert_eq!(load_all(dir.path()).expect("load"), [second, first]);
    assert!(TemplateDraft::create(dir.path(), &new.build_id).is_err(), "it is there already");
    assert_eq!(reclaim_drafts(dir.path()).expect("reclaim"), 1);
    assert!(!abandoned.dir().exists());
    abandoned.discard().expect("nothing is left to discard");
}

#[test]
fn half_a_template_is_never_visible() {
    let dir = tempfile::tempdir().expect("temp folder");
    for missing in [ROOTFS, "memory", "state", "machine.json"] {
        let meta = meta();
        let draft = TemplateDraft::create(dir.path(), &meta.build_id).expect("draft");
        fill(draft.dir());
        std::fs::remove_file(draft.dir().join(missing)).expect("remove");
        assert!(draft.publish(&meta).is_err(), "published without {missing}");
        assert_eq!(load_all(dir.path()).expect("load"), []);
        draft.discard().expect("discard");
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
}

#[test]
fn the_record_is_frozen() {
    let mut meta = meta();
    meta.template_id = "tmpl".parse().expect("an id");
    meta.build_id = "00000000-0000-4000-8000-000000000000".parse().expect("an id");
    let text = r#"{
  "format": 1,
  "template_id": "tmpl",
  "build_id": "00000000-0000-4000-8000-000000000000",
  "aliases": [
    "base",
    "my-team.x_1"
  ],
  "vcpus": 1,
  "memory_mib": 512,
  "disk_mib": 1,
  "envd_version": "0.6.13",
  "tier": "emulated",
  "fingerprint": "qemu 10.0",
  "created_at_unix_ms": 1700000000000,
  "source_key": "abc"
}
"#;
    assert_eq!(render(&meta), text);
    assert_eq!(parse(Path::new("r"), text.as_bytes()).expect("own text"), meta);
}

#[test]
fn records_that_are_not_exact_are_refused_by_name() {
    let good = render(&meta());
    let parse = |text: &str| parse(Path::new("r"), text.as_bytes());
    assert!(matches!(
        parse(&good.replace("\"format\": 1", "\"format\": 2, \"new\": 0")),
        Err(RecordError::Format { found: 2, .. })
    ));
    for (from, to) in [
        ("\"vcpus\": 1", "\"vcpus\": 1, \"extra\": 1"),
        ("\"vcpus\": 1,", ""),
        ("\"vcpus\": 1", "\"vcpus\": -1"),
        ("\"format\"", "\"fmt\""),
    ] {
        let text = good.replace(from, to);
        assert!(matches!(parse(&text), Err(RecordError::Malformed { .. })), "{text}");
    }
    for (from, to) in [
        ("\"vcpus\": 1", "\"vcpus\": 0"),
        ("emulated", "bare-metal"),
        ("\"base\"", "\"../base\""),
        ("\"base\"", "\"\""),
        ("\"build_id\": \"", "\"build_id\": \"x"),
        ("\"template_id\": \"", "\"template_id\": \"/"),
    ] {
        let text = good.replace(from, to);
        assert!(matches!(parse(&text), Err(RecordError::Invalid { .. })), "{text}");
    }
}

#[test]
fn a_folder_with_another_name_or_disk_is_refused() {
    let dir = tempfile::tempdir().expect("temp folder");
    let template = publish(dir.path(), &meta());
    let other = dir.path().join(BuildId::random().as_str());
    std::fs::rename(&template.dir, &other).expect("rename");
    assert!(matches!(Template::load(&other), Err(RecordError::Invalid { .. })));
    std::fs::rename(&other, &template.dir).expect("rename");
    let rootfs = OpenOptions::new().write(true).open(template.rootfs()).expect("open");
    rootfs.set_len(1 << 19).expect("shrink");
    let e = load_all(dir.path()).expect_err("the disk is too short");
    assert!(e.to_string().contains("rootfs.ext4"), "{e}");
}
