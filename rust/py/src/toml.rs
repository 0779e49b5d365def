//! Front of `dasd_lite_core::toml`.

use dasd_lite_core::toml::{self, Node, Table, Value};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};

use crate::boundary::caught;
use crate::boundary::errors::ConfigError;

#[pyfunction]
pub fn parse_toml<'py>(
    py: Python<'py>,
    text: &Bound<'py, PyString>,
) -> PyResult<(Bound<'py, PyDict>, Bound<'py, PyDict>)> {
    let Ok(text) = text.to_str() else {
        return Err(ConfigError::new_err("1:1: the text has a character that is not Unicode (a lone surrogate)"));
    };
    let table = caught(|| toml::parse(text))
        .map_err(PyRuntimeError::new_err)?
        .map_err(|error| ConfigError::new_err(error.to_string()))?;
    let mut converter = Converter { py, path: vec![], lines: PyDict::new(py) };
    let values = converter.table(table)?;
    Ok((values, converter.lines))
}

struct Converter<'py> {
    py: Python<'py>,
    /// Keys and indices that lead to the current value.
    path: Vec<Bound<'py, PyAny>>,
    lines: Bound<'py, PyDict>,
}

impl<'py> Converter<'py> {
    fn table(&mut self, table: Table) -> PyResult<Bound<'py, PyDict>> {
        let values = PyDict::new(self.py);
        for (key, node) in table {
            let key = PyString::new(self.py, &key).into_any();
            values.set_item(&key, self.node(key.clone(), node)?)?;
        }
        Ok(values)
    }

    fn node(&mut self, key: Bound<'py, PyAny>, node: Node) -> PyResult<Bound<'py, PyAny>> {
        self.path.push(key);
        self.lines.set_item(PyTuple::new(self.py, &self.path)?, node.line)?;
        let value = self.value(node.value)?;
        self.path.pop();
        Ok(value)
    }

    fn value(&mut self, value: Value) -> PyResult<Bound<'py, PyAny>> {
        let py = self.py;
        Ok(match value {
            Value::String(text) => PyString::new(py, &text).into_any(),
            Value::Integer(number) => number.into_pyobject(py)?.into_any(),
            Value::Float(number) => number.into_pyobject(py)?.into_any(),
            Value::Boolean(flag) => flag.into_pyobject(py)?.to_owned().into_any(),
            Value::Array(nodes) => {
                let elements = PyList::empty(py);
                for (index, node) in nodes.into_iter().enumerate() {
                    elements.append(self.node(index.into_pyobject(py)?.into_any(), node)?)?;
                }
                elements.into_any()
            }
            Value::Table(table) => self.table(table)?.into_any(),
        })
    }
}
