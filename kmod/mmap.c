// SPDX-License-Identifier: GPL-2.0
/*
 * Entrances through mappings. What is in page tables is used without asking, so a revocation
 * takes it out of them; here is where it comes back.
 */
#include "internal.h"
#include <linux/pagemap.h>

static struct df_sb *df_of_vmop(const struct vm_area_struct *vma)
{
	return container_of(READ_ONCE(vma->vm_ops), struct df_sb, vmop);
}

/*
 * Waits for the lease without the lock that the fault came with, for its holder may be needed to
 * give the lease back; then the fault is taken again.
 */
static vm_fault_t df_fault_wait(struct vm_fault *vmf, struct df_inode *di, u32 mode)
{
	struct distfuse_entry *entry;
	struct file *file;
	vm_fault_t ret = VM_FAULT_RETRY;

	if (!(vmf->flags & FAULT_FLAG_ALLOW_RETRY)) {
		entry = df_enter_slow(di, mode, DISTFUSE_MAPPED, false);
		if (IS_ERR(entry))
			return VM_FAULT_SIGBUS;
		ret = di->sb->stock_vmop->fault(vmf);
		df_leave(di, entry);
		return ret;
	}
	if (vmf->flags & FAULT_FLAG_RETRY_NOWAIT)
		return VM_FAULT_RETRY;
	df_count_sb(di->sb, DISTFUSE_FAULT_RETRIES);
	file = get_file(vmf->vma->vm_file);
	df_release_fault_lock(vmf);
	/* In and out again: what has to be installed is installed without the lock, too. */
	entry = df_enter_slow(di, mode, 0, false);
	if (!IS_ERR(entry))
		df_leave(di, entry);
	fput(file);
	return VM_FAULT_RETRY;
}

static vm_fault_t df_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct df_sb *ds = df_of_vmop(vma);
	struct df_inode *di = df_i(file_inode(vma->vm_file));
	bool write = (vmf->flags & FAULT_FLAG_WRITE) && (vma->vm_flags & VM_SHARED);
	u32 mode = write ? DISTFUSE_EXCLUSIVE : DISTFUSE_SHARED;
	struct distfuse_entry *entry;
	vm_fault_t ret;

	if (unlikely(!di || df_is_dead(ds)))
		return VM_FAULT_SIGBUS;
	df_map_note(di);
	entry = df_enter_fast(di, mode, DISTFUSE_MAPPED);
	if (!entry)
		return df_fault_wait(vmf, di, mode);
	df_count_sb(ds, DISTFUSE_HITS);
	if (write && unlikely(!df_space_for_page(di, entry, vmf->pgoff))) {
		df_leave(di, entry);
		return df_space_fault(vmf, di);
	}
	ret = ds->stock_vmop->fault(vmf);
	if (unlikely((ret & VM_FAULT_LOCKED) && !df_in_term(ds))) {
		/* It has slept for the page, which nobody may see any more. */
		unlock_page(vmf->page);
		put_page(vmf->page);
		vmf->page = NULL;
		ret = VM_FAULT_NOPAGE;
	}
	df_leave(di, entry);
	return ret;
}

/* May not sleep: if it cannot be done at once, nothing is mapped, and the fault proper comes. */
static vm_fault_t df_map_pages(struct vm_fault *vmf, pgoff_t start, pgoff_t end)
{
	struct df_sb *ds = df_of_vmop(vmf->vma);
	struct df_inode *di = df_i(file_inode(vmf->vma->vm_file));
	struct distfuse_entry *entry;
	vm_fault_t ret;

	/* The fault proper notes that it is mapped, which may sleep. */
	if (unlikely(!di) || !READ_ONCE(di->mapped))
		return 0;
	entry = df_enter_fast(di, DISTFUSE_SHARED, DISTFUSE_MAPPED);
	if (!entry)
		return 0;
	ret = ds->stock_vmop->map_pages(vmf, start, end);
	df_leave(di, entry);
	return ret;
}

/*
 * A page that is mapped to be read is to be written. The lock cannot be dropped here: without the
 * lease, or space, the page is unmapped, so that the task comes again, through df_fault().
 */
static vm_fault_t df_page_mkwrite(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct df_sb *ds = df_of_vmop(vma);
	struct inode *inode = file_inode(vma->vm_file);
	struct df_inode *di = df_i(inode);
	struct distfuse_entry *entry;
	vm_fault_t ret;

	if (unlikely(!di || df_is_dead(ds)))
		return VM_FAULT_SIGBUS;
	entry = df_enter_fast(di, DISTFUSE_EXCLUSIVE, DISTFUSE_MAPPED | DISTFUSE_DIRTY);
	if (entry && unlikely(!df_space_for_page(di, entry, vmf->pgoff))) {
		df_leave(di, entry);
		entry = NULL;
	}
	if (!entry) {
		unmap_mapping_pages(inode->i_mapping, vmf->pgoff, 1, false);
		return VM_FAULT_NOPAGE;
	}
	ret = ds->stock_vmop->page_mkwrite(vmf);
	/* A flush that begins when we have left must see it. */
	if (ret & VM_FAULT_LOCKED)
		set_page_dirty(vmf->page);
	df_leave(di, entry);
	return ret;
}

/* Our table for mappings; one that is not of the page cache is left alone. */
const struct vm_operations_struct *df_vmop(struct df_sb *ds,
					   const struct vm_operations_struct *stock)
{
	/* Pairs with the release below. */
	if (unlikely(!smp_load_acquire(&ds->stock_vmop))) {
		if (!stock->fault || !stock->page_mkwrite)
			return stock;
		spin_lock(&ds->lock);
		if (!ds->stock_vmop) {
			ds->vmop = *stock;
			ds->vmop.fault = df_fault;
			if (stock->map_pages)
				ds->vmop.map_pages = df_map_pages;
			ds->vmop.page_mkwrite = df_page_mkwrite;
			/* Pairs with the acquire above: the table is whole. */
			smp_store_release(&ds->stock_vmop, stock);
		}
		spin_unlock(&ds->lock);
	}
	return stock == ds->stock_vmop ? &ds->vmop : stock;
}
