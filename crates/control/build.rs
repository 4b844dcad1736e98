//! Rebuilds the crate when a migration is added, which the embedding macro alone cannot see.

fn main() {
    println!("cargo::rerun-if-changed=migrations");
}
