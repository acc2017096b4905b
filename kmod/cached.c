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

/* Whether a write is one that only has to be put where it belongs, and brings nothing else about. */
static bool df_is_plain(const struct kiocb *iocb, const struct inode *inode)
{
	return !(iocb->ki_flags & IOCB_APPEND) && !iocb_is_dsync(iocb) &&
	       /* A mount that writes through leaves times to its server. */
	       !(inode->i_flags & (S_NOCMTIME | S_SWAPFILE)) &&
	       /* No privileges that a write takes away, and none to be asked for. */
	       IS_NOSEC(inode) && !(inode->i_mode & (S_ISUID | S_ISGID)) &&
	       rlimit(RLIMIT_FSIZE) == RLIM_INFINITY;
}

/*
 * Writes the next bytes, which lie in one page, if it is dirty already. Nothing is to be accounted
 * for then, for space, dirty pages or a file that grows, and no writing back to be waited for. So
 * the inode need not be locked, only the page, as by a store to a mapping: a truncation sets the
 * size before it asks for the page's lock. Nothing here sleeps, so it is within the term in which
 * it was begun. False: nothing is done.
 */
static bool df_write_dirty(struct kiocb *iocb, struct iov_iter *from, size_t len)
{
	struct address_space *mapping = iocb->ki_filp->f_mapping;
	pgoff_t index = iocb->ki_pos >> PAGE_SHIFT;
	struct folio *folio = df_cached_folio(mapping, index);
	size_t copied = 0;
	struct page *page;

	if (!folio)
		return false;
	if (!folio_test_dirty(folio) || !folio_trylock(folio))
		goto put;
	if (likely(folio->mapping == mapping && folio_test_uptodate(folio) &&
		   folio_test_dirty(folio) && !folio_test_writeback(folio) &&
		   iocb->ki_pos + len <= i_size_read(mapping->host))) {
		page = folio_file_page(folio, index);
		if (unlikely(mapping_writably_mapped(mapping)))
			flush_dcache_page(page);
		/* Takes no faults, whatever the buffer is. */
		copied = copy_page_from_iter_atomic(page, offset_in_page(iocb->ki_pos), len, from);
		flush_dcache_page(page);
	}
	folio_unlock(folio);
put:
	folio_put(folio);
	if (unlikely(copied != len)) {
		iov_iter_revert(from, copied);
		return false;
	}
	iocb->ki_pos += len;
	return true;
}

/*
 * With the exclusive lease entered: a write within one page, if that is dirty already. Longer
 * writes come before or after in each page. False: nothing is done.
 */
bool df_write_page(struct kiocb *iocb, struct iov_iter *from, ssize_t *ret)
{
	struct file *file = iocb->ki_filp;
	size_t count = iov_iter_count(from);

	if (unlikely(!count || offset_in_page(iocb->ki_pos) + count > PAGE_SIZE) ||
	    unlikely(!df_is_plain(iocb, file_inode(file))) || file_update_time(file) ||
	    !df_write_dirty(iocb, from, count))
		return false;
	*ret = count;
	return true;
}

/*
 * With the exclusive lease entered, and page faults disabled: a longer write within the file. Its
 * pages are written as above as far as they are dirty; from the first one on that is not, the page
 * cache's own way goes on. The inode is locked all the while, as it is there, so that two such
 * writes do not get mixed up. What FUSE does besides, asking for size and mode, the lease has
 * answered. False: nothing is done.
 */
bool df_write_pages(struct kiocb *iocb, struct iov_iter *from, ssize_t *ret)
{
	struct file *file = iocb->ki_filp;
	struct inode *inode = file_inode(file);
	size_t count = iov_iter_count(from);
	struct df_sb *ds = df_i(inode)->sb;
	bool in_term = true;
	ssize_t rest = 0;
	size_t len;

	if (!df_is_plain(iocb, inode))
		return false;
	inode_lock(inode);
	if (iocb->ki_pos + count > i_size_read(inode) || !df_is_plain(iocb, inode) ||
	    file_update_time(file)) {
		inode_unlock(inode);
		return false;
	}
	while (iov_iter_count(from)) {
		len = min_t(size_t, PAGE_SIZE - offset_in_page(iocb->ki_pos),
			    iov_iter_count(from));
		/* It may have slept since the page before. */
		in_term = df_in_term(ds);
		if (unlikely(!in_term || fatal_signal_pending(current)) ||
		    !df_write_dirty(iocb, from, len))
			break;
		cond_resched();
	}
	if (unlikely(!in_term))
		rest = DF_NO_SPACE;
	else if (iov_iter_count(from))
		rest = df_perform_write(iocb, from);
	inode_unlock(inode);
	*ret = count == iov_iter_count(from) ? rest : count - iov_iter_count(from);
	return true;
}
