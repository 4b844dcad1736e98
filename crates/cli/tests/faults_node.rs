//! `kill -9` at every step of a node, on the fake driver: nothing of its sandboxes is left, and the
//! store says how each of them ended.

#[path = "support/deaths.rs"]
mod deaths;
#[path = "support/rows.rs"]
mod rows;
#[path = "support/server.rs"]
mod server;

use std::path::PathBuf;

use deaths::{Op, Role, acknowledged, agreed, ask, assert_ended, deaths, make, one_process_dies};
use server::{Server, fake_template, left_in, node};

#[test]
fn a_node_dies_at_every_step_and_leaves_nothing() {
    let node_data = tempfile::tempdir().expect("a temporary folder");
    fake_template(node_data.path());
    let data = tempfile::tempdir().expect("a temporary folder");
    let first_node = Server::start_node(node_data.path(), "fake");
    let socket = PathBuf::from(first_node.text("socket"));
    let control = Server::start_control(data.path(), &socket);
    first_node.stop();
    for death in deaths(Role::Node) {
        let mut command = node(node_data.path());
        command.args(["--runtime", "fake"]).env("BELLJAR_FAULT", death.text());
        let armed = Server::run(&mut command);
        let first = make(&control, data.path(), if death.op == Op::Expire { 1 } else { 1000 });
        let answer = ask(&control, death.op, &first.id);
        armed.dies(&death.text());
        if death.op == Op::Create {
            assert!(!acknowledged(&answer), "{death:?}: a sandbox that does not run: {answer:?}");
        }

        let again = Server::start_node(node_data.path(), "fake");
        let tag = again.text("host_tag").to_owned();
        assert_eq!(left_in(node_data.path(), &tag), Vec::<String>::new(), "{death:?}");
        assert_eq!(agreed(&control, data.path(), &socket, death), Vec::<String>::new());
        assert_eq!(control.api("GET", &format!("/sandboxes/{}", first.id), None).0, 404);
        assert_ended(data.path(), &first.id, death);
        again.stop();
    }
    control.stop();
}

#[test]
fn a_whole_server_dies_at_every_step_of_its_node() {
    one_process_dies(Role::Node);
}
