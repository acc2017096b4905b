// SPDX-License-Identifier: GPL-2.0
/*
 * Reads and writes of what is in the page cache already. They are shorter than the page cache's
 * own way, which has to be prepared for more.
 */
#include "internal.h"
#include <linux/pagemap.h>
#include <linux/swap.h>
#include <linux/uaccess.h>
#include <linux/uio.h>

/* What is longer is worth entering for, which spares it from being read again. */
#define DF_GLANCE	(64UL << 10)

/*
 * The usual case of what follows: all that is wanted is in one page that is there. What the page
 * cache's own way does besides is for the others. No atime: FUSE's inodes have none of their own.
 */
static bool df_read_page(struct kiocb *iocb, struct iov_iter *to)
{
	struct file *file = iocb->ki_filp;
	struct address_space *mapping = file->f_mapping;
	size_t count = iov_iter_count(to), copied = 0;
	pgoff_t index = iocb->ki_pos >> PAGE_SHIFT;
	struct folio *folio;

	if (unlikely(offset_in_page(iocb->ki_pos) + count > PAGE_SIZE))
		return false;
	folio = df_cached_folio(mapping, index);
	if (unlikely(!folio))
		return false;
	/*
	 * The mark is for the page cache's own way, which reads ahead there. The size counts
	 * after the page's being valid.
	 */
	if (likely(folio_test_uptodate(folio) && !folio_test_readahead(folio) &&
		   iocb->ki_pos + count <= i_size_read(mapping->host))) {
		if (unlikely(mapping_writably_mapped(mapping)))
			flush_dcache_folio(folio);
		if ((file->f_ra.prev_pos - 1) >> PAGE_SHIFT != index)
			folio_mark_accessed(folio);
		copied = copy_page_to_iter(folio_file_page(folio, index),
					   offset_in_page(iocb->ki_pos), count, to);
	}
	folio_put(folio);
	if (unlikely(copied != count)) {
		iov_iter_revert(to, copied);
		return false;
	}
	iocb->ki_pos += count;
	file->f_ra.prev_pos = iocb->ki_pos;
	return true;
}

/*
 * Reads what is in the page cache without entering, which would have all readers of a file write
 * its word. If the lease was held and installed before, and still is, then so it was all the
 * while, for the generation moves with every grant: what was copied is of a time at which it
 * could be read. Nobody waits for such a reader, so it must wait for nothing. False: nothing is
 * done.
 */
bool df_read_cached(struct kiocb *iocb, struct iov_iter *to, ssize_t *ret)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	struct df_inode *di = df_i(inode);
	size_t count = iov_iter_count(to);
	loff_t pos = iocb->ki_pos;
	struct df_glance glance;
	int flags = iocb->ki_flags;

	if (unlikely(!di) || !user_backed_iter(to) || count > DF_GLANCE ||
	    !df_glance(di, DISTFUSE_SHARED, &glance))
		return false;
	pagefault_disable();
	if (likely(df_read_page(iocb, to))) {
		*ret = count;
	} else {
		iocb->ki_flags |= IOCB_NOIO;
		/*
		 * What FUSE does besides, asking whether the size is right, the lease has
		 * answered.
		 */
		*ret = generic_file_read_iter(iocb, to);
		iocb->ki_flags = flags;
	}
	pagefault_enable();
	if (likely(*ret >= 0 && (!iov_iter_count(to) || iocb->ki_pos >= i_size_read(inode)) &&
		   df_glance_holds(di, &glance))) {
		df_count_sb(di->sb, DISTFUSE_HITS);
		return true;
	}
	iov_iter_revert(to, count - iov_iter_count(to));
	iocb->ki_pos = pos;
	return false;
}

/*
 * Whether a write is one that only has to be put where it belongs: it is in one page, and brings
 * nothing else about.
 */
static bool df_is_plain(const struct kiocb *iocb, const struct inode *inode, size_t count)
{
	return count && offset_in_page(iocb->ki_pos) + count <= PAGE_SIZE &&
	       !(iocb->ki_flags & IOCB_APPEND) && !iocb_is_dsync(iocb) &&
	       /* A mount that writes through leaves times to its server. */
	       !(inode->i_flags & (S_NOCMTIME | S_SWAPFILE)) &&
	       /* No privileges that a write takes away, and none to be asked for. */
	       IS_NOSEC(inode) && !(inode->i_mode & (S_ISUID | S_ISGID)) &&
	       rlimit(RLIMIT_FSIZE) == RLIM_INFINITY;
}

/*
 * With the exclusive lease entered: writes into a page that is dirty already. Nothing is to be
 * accounted for then, for space, dirty pages or a file that grows, and no writing back to be
 * waited for. So the inode need not be locked, only the page, as by a store to a mapping: a
 * truncation sets the size before it asks for the page's lock, and longer writes come before or
 * after in each page. Nothing here sleeps, so it is within the term in which it was entered.
 * False: nothing is done.
 */
bool df_write_page(struct kiocb *iocb, struct iov_iter *from, ssize_t *ret)
{
	struct file *file = iocb->ki_filp;
	struct address_space *mapping = file->f_mapping;
	struct inode *inode = mapping->host;
	size_t count = iov_iter_count(from), copied = 0;
	pgoff_t index = iocb->ki_pos >> PAGE_SHIFT;
	struct folio *folio;
	struct page *page;

	if (unlikely(!df_is_plain(iocb, inode, count)))
		return false;
	folio = df_cached_folio(mapping, index);
	if (!folio)
		return false;
	if (!folio_test_dirty(folio) || file_update_time(file) || !folio_trylock(folio))
		goto put;
	if (likely(folio->mapping == mapping && folio_test_uptodate(folio) &&
		   folio_test_dirty(folio) && !folio_test_writeback(folio) &&
		   iocb->ki_pos + count <= i_size_read(inode))) {
		page = folio_file_page(folio, index);
		if (unlikely(mapping_writably_mapped(mapping)))
			flush_dcache_page(page);
		/* Takes no faults, whatever the buffer is. */
		copied = copy_page_from_iter_atomic(page, offset_in_page(iocb->ki_pos), count,
						    from);
		flush_dcache_page(page);
	}
	folio_unlock(folio);
put:
	folio_put(folio);
	if (unlikely(copied != count)) {
		iov_iter_revert(from, copied);
		return false;
	}
	iocb->ki_pos += count;
	*ret = count;
	return true;
}
