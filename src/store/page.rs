//! One page of a list: its rows, whether more follow, and how many there are on all pages.

use sqlx::{ColumnIndex, Decode, Executor, FromRow, IntoArguments, QueryBuilder, Type};

use super::dialect::{Dialect, SqlStore, failure};
use super::{Page, StoreError};

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    usize: ColumnIndex<D::Row>,
    for<'q> i64: Decode<'q, D> + Type<D>,
{
    /// Reads a page of `limit` items by `rows`, which asks for one more, and the total by `count`: both at once
    /// where the pool has a connection for each, so that a page takes as long as the longer of them.
    pub(super) async fn counted_page<T>(
        &self,
        mut count: QueryBuilder<D>,
        mut rows: QueryBuilder<D>,
        limit: u32,
    ) -> Result<Page<T>, StoreError>
    where
        T: for<'r> FromRow<'r, D::Row> + Send + Unpin,
    {
        let total = count.build_query_scalar::<i64>();
        let rows = rows.build_query_as::<T>();
        let (total, items) = tokio::try_join!(total.fetch_one(&self.readers), rows.fetch_all(&self.readers))
            .map_err(failure::<D>)?;
        let (items, more) = cut(items, limit);
        Ok(Page { items, total: u64::try_from(total).unwrap_or_default(), more })
    }
}

/// The items of a page that was read one item further than its limit, and whether more follow.
pub(crate) fn cut<T>(mut items: Vec<T>, limit: u32) -> (Vec<T>, bool) {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = items.len() > limit;
    items.truncate(limit);
    (items, more)
}
