//! Table: columns of text, for people.

use std::fmt;

use super::output;

/// Which side a column's text is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

/// Rows under a head. Columns are as wide as they must be.
#[derive(Debug)]
pub struct Table {
    sides: Vec<Side>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns; a name that begins with `>` is that of a column of numbers.
    pub fn new(columns: &[&str]) -> Self {
        let sides = columns.iter().map(|name| if name.starts_with('>') { Side::Right } else { Side::Left }).collect();
        let head = columns.iter().map(|name| name.trim_start_matches('>').to_owned()).collect();
        Self { sides, rows: vec![head] }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.sides.len());
        // A cell is one line, whatever a name has.
        self.rows.push(cells.iter().map(|cell| output::name(cell).into_owned()).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..self.sides.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), side) in row.iter().zip(&widths).zip(&self.sides) {
                match side {
                    Side::Left => line += &format!("{cell:<width$}  "),
                    Side::Right => line += &format!("{cell:>width$}  "),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_makes_no_row() {
        let mut table = Table::new(&["NAME", ">SIZE"]);
        table.row(["a\nb  7".to_owned(), "1".to_owned()]);
        assert_eq!(table.to_string(), "NAME     SIZE\na\\nb  7     1\n");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", ">SIZE"]);
        table.row(["a".to_owned(), "1".to_owned()]);
        table.row(["höhe2".to_owned(), "100.0 B".to_owned()]);
        assert_eq!(table.to_string(), "NAME      SIZE\na            1\nhöhe2  100.0 B\n");
    }
}
