/* A PKCS#11 module that can hardly do anything, and that with the faults chosen by -D:
 * LIST_FAILS, SECOND_LIST_FAILS, NO_LIST, VERSION=n, HOLE: what its C_GetFunctionList does;
 * INITIALIZE=code|hang(): what C_Initialize answers;
 * SLOTS=hang|crash|refuse: what C_GetSlotList does;
 * WORKS: sessions can be opened, every PIN is right, and C_Decrypt turns every bit over. It keeps nothing that it sees. */
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>
#include "../cryptoki.h"

static CK_RV refuse(void) { return 0x54; } /* CKR_FUNCTION_NOT_SUPPORTED */

/* Says so by making the file $STUB_HANGS, because nobody may look into a host. */
static CK_RV hang(void) {
	const char *file = getenv("STUB_HANGS");
	if (file != NULL)
		close(open(file, O_CREAT | O_WRONLY, 0600));
	for (;;)
		pause();
}

static CK_RV crash(void) { return *(volatile CK_RV *)8; }

#ifndef INITIALIZE
#define INITIALIZE 0
#endif
static CK_RV initialize(void *args) { return args == NULL ? 0x7 : INITIALIZE; }

static CK_RV info(CK_BYTE *out) {
	for (int i = 0; i < 88; i++) /* CK_INFO, of which a NUL is what some vendors pad with */
		out[i] = 0;
	out[0] = 2;
	out[1] = 40;
	out[2] = 'M';
	return 0;
}

#ifdef WORKS
static CK_RV accept(void) { return 0; }

static CK_RV open_session(CK_ULONG slot, CK_ULONG flags, void *application, void *notify, CK_ULONG *session) {
	(void)slot, (void)flags, (void)application, (void)notify;
	*session = 1;
	return 0;
}

static CK_RV decrypt(CK_ULONG session, const CK_BYTE *in, CK_ULONG inLen, CK_BYTE *out, CK_ULONG *outLen) {
	(void)session;
	for (CK_ULONG i = 0; i < inLen && i < *outLen; i++)
		out[i] = ~in[i];
	return 0;
}
#endif

static CK_FUNCTION_LIST list;

#ifndef NO_SYMBOL
CK_RV C_GetFunctionList(CK_FUNCTION_LIST **out) {
	void **end = (void **)(&list + 1);
	for (void **f = &list.C_Initialize; f < end; f++)
		*f = (void *)refuse;
	list.C_Initialize = (void *)initialize;
	list.C_GetInfo = (void *)info;
#ifdef SLOTS
	list.C_GetSlotList = (void *)SLOTS;
#endif
#ifdef WORKS
	list.C_OpenSession = (void *)open_session;
	list.C_CloseSession = (void *)accept;
	*(void **)&list.C_Login = (void *)accept;
	*(void **)&list.C_SetPIN = (void *)accept;
	*(void **)&list.C_DecryptInit = (void *)accept;
	list.C_Decrypt = decrypt;
#endif
	(void)hang, (void)crash;
	list.version.major = 2;
#ifdef VERSION
	list.version.major = VERSION;
#endif
#ifdef HOLE
	list.C_DeriveKey = NULL;
#endif
#ifdef SECOND_LIST_FAILS
	static int calls;
	if (calls++ > 0)
		return 0x2; /* CKR_HOST_MEMORY */
#endif
#ifdef LIST_FAILS
	return 0x5; /* CKR_GENERAL_ERROR, and nothing in *out */
#endif
#ifndef NO_LIST
	*out = &list;
#endif
	return 0;
}
#endif

#ifdef MISSING
extern CK_RV nobody_has_this(void);
CK_RV needs_it(void) { return nobody_has_this(); }
#endif
