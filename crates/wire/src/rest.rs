//! The public REST API's JSON shapes, field for field as `contract/e2b-wire.md` section 1 has them.
