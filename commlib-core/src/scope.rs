//! Where endpoints are made: a connection, and what a node adds to it.

use std::sync::Arc;

use crate::address::{Name, Pattern};
use crate::connection::Connection;
use crate::error::Result;
use crate::tasks::Tasks;

/// A connection with the namespace and the task group that new endpoints belong to.
#[derive(Debug, Clone)]
pub struct Scope {
    connection: Connection,
    namespace: Option<Name>,
    tasks: Arc<Tasks>,
}

/// Implemented by what endpoints can be made on: [`Connection`] and [`Node`](crate::Node).
pub trait Scoped {
    /// The scope for new endpoints.
    fn scope(&self) -> Scope;
}

impl Scope {
    pub(crate) fn new(connection: Connection, namespace: Option<Name>, tasks: Arc<Tasks>) -> Self {
        Self {
            connection,
            namespace,
            tasks,
        }
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn tasks(&self) -> &Arc<Tasks> {
        &self.tasks
    }

    /// A name in this scope: prefixed with the namespace, or absolute after a leading dot.
    pub(crate) fn name(&self, name: &str) -> Result<Name> {
        Name::new(self.absolute(name)?)
    }

    /// A pattern in this scope; see [`name`](Self::name).
    pub(crate) fn pattern(&self, pattern: &str) -> Result<Pattern> {
        Pattern::new(self.absolute(pattern)?)
    }

    fn absolute(&self, text: &str) -> Result<String> {
        Ok(match (text.strip_prefix('.'), &self.namespace) {
            (Some(absolute), _) => absolute.to_owned(),
            (None, Some(namespace)) => {
                // Checked by itself first, so that the message is about what the caller wrote.
                Pattern::new(text)?;
                format!("{namespace}.{text}")
            }
            (None, None) => text.to_owned(),
        })
    }
}
